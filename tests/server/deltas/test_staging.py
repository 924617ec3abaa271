"""A variant decoded by one thread or by several, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compressor.artifact.reader import read_artifact
from compressor.errors import UnsupportedTensor
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


def test_decoder_has_no_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_threads(torch.device("cuda")) >= 1
    monkeypatch.setenv("PYTHON_CPU_COUNT", "1")
    assert decode_threads(torch.device("cuda")) == 1
    assert decode_threads(torch.device("cpu")) == 1
