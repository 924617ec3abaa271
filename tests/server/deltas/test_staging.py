"""A variant decoded by one thread or by several, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from compressor.artifact.reader import read_artifact
from compressor.codecs import DenseRows, TensorDelta, lowrank_from_factors
from compressor.errors import UnsupportedTensor
from server.deltas.failures import Overflow, failure_of, is_lasting
from server.deltas.staging import decode_threads, stage_variant
from server.model.base import load_base_model
from tests.server.conftest import ALL_CODECS, Served


def test_stage_by_several_threads_gives_the_same_parts(served: Callable[..., Served]) -> None:
    pair = served("llama", ALL_CODECS)
    base = load_base_model(pair.base, torch.device("cpu"), torch.float32, "torch")
    for name in ("blockdiag", "impart", "head"):
        artifact = read_artifact(pair.deltas / name)
        one, three = (stage_variant(artifact, base.parameters, n) for n in (1, 3))
        assert len(one) == len(three) > 10
        for left, right in zip(one, three, strict=True):
            assert left.parameter is right.parameter
            assert [key for key, _ in left.terms] == [key for key, _ in right.terms]
            assert all(
                torch.equal(a, b)
                for (_, mine), (_, theirs) in zip(left.terms, right.terms, strict=True)
                for a, b in zip(mine, theirs, strict=True)
            )


def test_stage_by_several_threads_names_what_does_not_fit(served: Callable[..., Served]) -> None:
    artifact = read_artifact(served("llama", ALL_CODECS).deltas / "blockdiag")
    with pytest.raises(UnsupportedTensor, match="cannot give variants their own value"):
        stage_variant(artifact, {}, 3)


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
LARGE = {
    "a vector": lambda m, n: TensorDelta(
        NORM, (n,), (n,), False, (), DenseRows(0, torch.full((n,), 7e4))
    ),
    "rows": lambda m, n: TensorDelta(
        Q, (m, n), (m, n), False, (), DenseRows(0, torch.full((m, n), -7e4))
    ),
    "factors": lambda m, n: TensorDelta(
        Q,
        (m, n),
        (m, n),
        False,
        (lowrank_from_factors(torch.full((1, n), 1e-3), torch.full((1, m), 7e4), 32),),
        None,
    ),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_stage_of_values_that_float16_cannot_hold_is_refused_with_the_remedy(
    served: Callable[..., Served], make: Callable[[int, int], TensorDelta]
) -> None:
    pair = served("llama", ALL_CODECS)
    artifact = read_artifact(pair.deltas / "blockdiag")
    for dtype in (torch.bfloat16, torch.float16):
        base = load_base_model(pair.base, torch.device("cpu"), dtype, "torch")
        m, n = base.parameters[Q].shape
        large = replace(artifact, tensors=(make(m, n),))
        if dtype == torch.bfloat16:
            stage_variant(large, base.parameters)
            continue
        with pytest.raises(Overflow, match=r"model\.\S+: a value of it is beyond 65504") as refused:
            stage_variant(large, base.parameters)
        assert "--dtype bfloat16" in failure_of(refused.value).remedy
        assert is_lasting(refused.value)


def test_decoder_has_no_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_threads(torch.device("cuda")) >= 1
    monkeypatch.setenv("PYTHON_CPU_COUNT", "1")
    assert decode_threads(torch.device("cuda")) == 1
    assert decode_threads(torch.device("cpu")) == 1
