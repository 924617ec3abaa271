"""Definitions whose norms, embeddings, scales and heads are not those of Llama: the engine's tokens
are those of `generate` on the reconstructed weights, for the base and variants in one batch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.deltas.residency import Residency
from server.deltas.whole import WholeParameter
from server.model.by_slot import BySlot, OwnValue, split_of
from server.model.context import StepContext
from server.model.kv_store import KVStore
from server.model.observe import Call, Method, Observation
from server.ops.kernels import TorchKernels
from server.ops.row_mapping import RowMapping, Segment
from tests.server.conftest import N_TRUTH, PAIR, Served
from tests.server.helpers import CoreHarness

PROMPTS = [[5, 6, 7, 8, 9], [40, 12, 99, 3, 77, 120, 9, 33, 250, 11, 14, *range(60, 75)], [17]]
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320}
FULL = {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0}
GEMMA3N = {"activation_sparsity_pattern": None, "intermediate_size": [112] * 2}
EVERY = [
    ("hunyuan_v1_dense", {}),  # norms heads after it has transposed them
    ("cohere", {"use_qk_norm": True}),  # a weight for every head and column
    (
        "modernbert-decoder",  # a product and a norm between the backbone and the decoder
        {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
    ),
]
MORE = [
    ("phi", {"qk_layernorm": True}),  # as HunYuan, with a bias
    ("stablelm", {"qk_layernorm": True}),  # a norm for every head
    # A scale that is read in a method beside forward; embeddings for every layer.
    ("gemma3n_text", FULL | PER_LAYER | GEMMA3N),
    ("nanochat", {}),  # norms without a weight
]


def assert_all_equal_generate(engine: CoreHarness, pair: Served) -> None:
    """All prompts to all models in one go, against the oracle one by one."""
    sent = {
        (name, i): engine.submit(name, prompt, max_tokens=N_TRUTH)
        for i, prompt in enumerate(PROMPTS)
        for name in pair.checkpoints
    }
    engine.run(*sent.values())
    for (name, i), request in sent.items():
        assert request.error is None
        assert request.output_ids == pair.truth(name, PROMPTS[i]), (name, i)


def test_engine_output_bias_with_added_vocabulary_equals_generate(
    served: Any, harness: Any
) -> None:
    """Phi's output has a bias, which grows with the vocabulary."""
    pair = served("phi", PAIR, extra_vocab=3)
    assert_all_equal_generate(harness(pair, kernels=TorchKernels()), pair)


@pytest.mark.parametrize(
    ("kind", "config"),
    [*EVERY, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)],
)
def test_engine_of_that_definition_equals_generate(
    served: Any, harness: Any, kind: str, config: dict[str, Any]
) -> None:
    pair = served(kind, PAIR, **config)
    assert_all_equal_generate(harness(pair, kernels=TorchKernels()), pair)


class Gate(nn.Module):
    """``x * sigmoid(scale)``, and what else a test wants."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(n), requires_grad=False)

    def forward(self, x: Tensor, at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return x * torch.sigmoid(self.scale), at["positions"].float() * self.scale.sum()

    def mixed(self, x: Tensor) -> Tensor:
        return x * self.scale + x.cumsum(1)


def observed(method: str, module: nn.Module, *args: Any) -> Observation:
    """What `observe` would have seen of one call with 7 tokens."""
    seen = Observation(n_tokens=7, n_kept=3)
    output = getattr(module, method)(*args)
    seen.calls[module, method] = [Call(args, {}, (), output)]
    return seen


def heads_first(n_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(1, 2, n_rows, 4), {"positions": torch.arange(n_rows).unsqueeze(0)}


def test_split_of_method_that_mixes_rows_is_none() -> None:
    gate = Gate(4)
    assert split_of(Method(gate, "mixed"), observed("mixed", gate, torch.randn(1, 7, 4))) is None


def test_split_of_rows_on_two_axes_is_none() -> None:
    gate = Gate(7)
    x = torch.randn(1, 7, 7)
    seen = observed("forward", gate, x, {"positions": torch.arange(7)})
    assert split_of(Method(gate, "forward"), seen) is None


def test_by_slot_gives_every_row_its_own_value() -> None:
    gate = Gate(4)
    split = split_of(Method(gate, "forward"), observed("forward", gate, *heads_first(7)))
    assert split is not None
    parameter = WholeParameter("scale", gate.scale.data, TorchKernels(), Residency())
    own = {slot: torch.randn(4) for slot in (0, 2)}
    parameter.own.update(own)
    context = StepContext()
    values = [OwnValue(gate, "scale", parameter)]
    by_slot = BySlot(gate.forward, split, values, context, KVStore(TorchKernels()))
    segments = [Segment(-1, 0, 2), Segment(0, 2, 5), Segment(1, 5, 6), Segment(2, 6, 8)]
    context.rows = RowMapping(segments, torch.device("cpu"))
    x, at = heads_first(8)
    y, scaled = by_slot(x, at)
    for segment in segments:
        scale = own.get(segment.slot, gate.scale.data)
        for row in range(segment.start, segment.end):
            assert torch.allclose(y[:, :, row], x[:, :, row] * torch.sigmoid(scale))
            assert torch.allclose(scaled[0, row], row * scale.sum())
    assert gate.scale.data_ptr() == parameter.base.data_ptr(), "the base's value is back"
