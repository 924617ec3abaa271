"""Layers are calls of the attention function: each has keys and values of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.errors import EngineError
from server.model.attention import attach_store
from server.model.kv_store import AttentionForm, KVStore, ProbedCall
from server.model.mask import CAUSAL
from server.ops.attention import AttentionMetadata, PrefillChunk
from server.ops.kernels import TorchKernels
from tests.server.conftest import Served
from tests.server.model.test_base import assert_parity
from tests.tiny import make_tiny

RECURRENT = {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 1, "num_hidden_layers": 8}
REPEATING = [
    ("diffllama", {}, [2, 2]),  # a module calls twice, with other values
    ("hrm_text", RECURRENT, [2, 2, 2, 2]),  # the model runs a module twice
]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("kind", "config", "calls"), REPEATING)
def test_engine_module_that_attends_several_times_equals_generate(
    tmp_path: Path, harness, kind: Any, config: dict[str, Any], calls: list[int], static: bool
) -> None:
    base = make_tiny(kind, tmp_path / "base", seed=3, **config)
    alone = Served(base, tmp_path / "none", {"base": base})
    alone.deltas.mkdir()
    engine = harness(
        alone, static=static, kernels=TorchKernels(), kv_block_tokens=8, max_batch_tokens=16
    )
    layers = engine.core._runner.base.store.layers
    assert [len(of_module) for of_module in layers.values()] == calls
    assert_parity(engine, alone)
    assert_parity(engine, alone)  # with prefixes from the cache


FORM = AttentionForm(scale=1.0)


def probed(*modules: nn.Module) -> KVStore:
    store = KVStore(TorchKernels())
    x = torch.randn(1, 2, 3, 4)
    with store.probing():
        for module in modules:
            store.learn_mask(module, CAUSAL)
            store.probe(module, ProbedCall(x, x, x, FORM))
    store.allocate(2, 4, torch.device("cpu"))
    return store


def one_step(first_row: int = 0) -> AttentionMetadata:
    chunk = PrefillChunk(0, 3, 0, torch.tensor([1]))
    return AttentionMetadata(torch.arange(4, 7), None, (chunk,), first_row=first_row)


def rows(seed: int, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, n, 2, 4, generator=torch.Generator().manual_seed(seed))
    return q, k, v


def test_second_call_of_a_module_leaves_the_first_ones_keys() -> None:
    module = nn.Identity()
    store = probed(module, module)
    with store.step(one_step()):
        for seed in (1, 2):
            store.attend(module, rows(seed), FORM)
    for seed, layer in zip((1, 2), store.kv_blocks[module], strict=True):
        assert torch.equal(layer.k[1, :3], rows(seed)[1])
        assert torch.equal(layer.v[1, :3], rows(seed)[2])
    store.wipe([1])
    assert not any(layer.k.any() or layer.v.any() for layer in store.all_kv_blocks())


def test_parts_of_the_rows_make_the_same_calls() -> None:
    """A module that runs once for each slot: its ordinals begin anew with the rows."""
    module = nn.Identity()
    store = probed(module)
    with store.step(one_step()):
        for first_row in (0, 3):
            store.metadata = one_step(first_row)
            store.attend(module, rows(first_row), FORM)
    with pytest.raises(EngineError):
        run(store, [(module, rows(1), FORM)] * 2)


def run(store: KVStore, calls: list[tuple[nn.Module, Any, AttentionForm]]) -> None:
    with store.step(one_step()):
        for call in calls:
            store.attend(*call)


@pytest.mark.parametrize("case", ["fewer", "more", "unknown", "rows", "heads", "form"])
def test_step_with_other_calls_than_probed_is_an_error(case: str) -> None:
    module = nn.Identity()
    store = probed(module, module)
    q, k, v = rows(1)
    good = (module, (q, k, v), FORM)
    calls = {
        "fewer": [good],
        "more": [good] * 3,
        "unknown": [good, good, (nn.Identity(), (q, k, v), FORM)],
        "rows": [good, (module, rows(1, 2), FORM)],
        "heads": [good, (module, (q, k[:, :1], v[:, :1]), FORM)],
        "form": [good, (module, (q, k, v), AttentionForm(scale=1.0, window=2))],
    }
    with pytest.raises(EngineError, match="other calls in this step"):
        run(store, calls[case])
    assert store.metadata is None
    run(store, [good, good])


def test_bytes_per_token_counts_every_call() -> None:
    module, other = nn.Identity(), nn.Identity()
    assert probed(module, module, other).bytes_per_token() == 3 * 2 * (2 * 4) * 4


def test_copied_module_keeps_its_store() -> None:
    """A norm that is copied while layers are replaced must not copy the model with the store."""
    store, norm = KVStore(TorchKernels()), nn.LayerNorm(4)
    attach_store(norm, store)
    copied = copy.deepcopy(norm)
    assert copied.impart_kv_store is store
    assert copied.weight is not norm.weight


def test_blocks_of_another_store_are_read_and_written_for_a_while() -> None:
    module = nn.Identity()
    store = probed(module)
    own = store.kv_blocks
    other = store.aside()
    other.allocate(5, 8, torch.device("cpu"))
    with store.blocks_of(other):
        assert store.kv_blocks[module] is other.kv_blocks[module]
        assert (store.n_kv_blocks, store.block_tokens) == (5, 8)
    assert store.kv_blocks is own
    assert (store.n_kv_blocks, store.block_tokens) == (2, 4)
