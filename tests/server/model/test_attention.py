"""Attention beyond causal and windows: greedy tokens are those of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.model.base import load_base_model
from server.ops.kernels import TorchKernels
from tests.server.conftest import Served
from tests.server.helpers import CoreHarness
from tests.server.model.test_base import assert_parity
from tests.tiny import make_tiny

LATENT = {  # values of 12 numbers, keys of 24
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "granite_swa": {  # sinks, in a window and without
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4_text": {  # chunks; positions count where there is no rotary embedding
        "attention_chunk_size": 16,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "floor_scale": 8,
        "moe_layers": [],
        "intermediate_size_mlp": 112,
        "pad_token_id": 0,
    },
    "deepseek_v3": LATENT
    | {
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Served]:
    made: dict[str, Served] = {}

    def base_of(kind: Any) -> Served:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = make_tiny(kind, folder / "base", seed=3, **KINDS[kind])
            made[kind] = Served(base, folder / "none", {"base": base})
            made[kind].deltas.mkdir()
        return made[kind]

    return base_of


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_engine_with_preemption_and_reused_prefixes_equals_generate(
    bases: Callable[[Any], Served], harness: Callable[..., CoreHarness], kind: str, static: bool
) -> None:
    """In prefill steps that end anywhere, in steps with both, in decode steps."""
    served = bases(kind)
    settings = {"static": static, "kernels": TorchKernels(), "kv_block_tokens": 8}
    block_bytes = harness(served, **settings).core._runner.base.store.bytes_per_token() * 8
    engine = harness(served, **settings, kv_cache_bytes=block_bytes * 18, max_batch_tokens=21)
    assert_parity(engine, served)
    assert engine.core.stats().n_preemptions > 0
    assert_parity(engine, served)


@pytest.mark.parametrize("kind", KINDS)
def test_engine_with_the_cpu_kernels_equals_generate(
    bases: Callable[[Any], Served], harness: Callable[..., CoreHarness], kind: str
) -> None:
    served = bases(kind)
    assert_parity(harness(served, kernels="numba", kv_block_tokens=8), served)


def test_narrow_values_take_the_memory_of_their_width(bases: Callable[[Any], Served]) -> None:
    base = load_base_model(bases("deepseek_v3").base, torch.device("cpu"), torch.float32, "torch")
    assert base.store.bytes_per_token() == 2 * 4 * (24 + 12) * 4
    base.store.allocate(3, 8, base.device)
    held = sum(layer.k.nbytes + layer.v.nbytes for layer in base.store.all_kv_blocks())
    assert held == 3 * 8 * base.store.bytes_per_token()
