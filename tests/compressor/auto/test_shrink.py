from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import compressor.auto.bench as auto_bench
import compressor.auto.search as auto
import compressor.auto.texts as auto_texts
from compressor.artifact.reader import read_artifact
from compressor.artifact.staging import StagedDeltas
from compressor.auto.kept import Measured
from compressor.auto.shrink import shrink, with_rescale
from compressor.codecs import BlockDiagTerm, TensorDelta
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.encoders.codec import make_encoder
from compressor.progress import Progress, silent
from tests.compressor.codec_oracles import encode, random_matrix

LARGE, SMALL = (64, 32), (8, 8)


def delta(name: str, shape: tuple[int, int], scale_bits: int = 8, bits: int = 2) -> TensorDelta:
    params = {"n_blocks": 4, "bits": bits, "scale_bits": scale_bits}
    if bits != 16:
        params |= {"head_rank": 2, "head_bits": 4}
    terms = tuple(encode(make_encoder("blockdiag", bits=bits), random_matrix(shape, 0), params))
    return TensorDelta(name, shape, shape, False, terms, None)


def scale_of(tried: TensorDelta, original: TensorDelta) -> float:
    ours, theirs = tried.terms[-1], original.terms[-1]
    return float(ours.to_dense().norm() / theirs.to_dense().norm())


def model_that_likes(
    wanted: dict[str, float], originals: Mapping[str, TensorDelta]
) -> Callable[..., Measured]:
    """KL grows with the distance of each matrix's scale from the wanted one; two sets."""

    def measure(deltas: Mapping[str, TensorDelta], progress: Progress = silent) -> Measured:
        del progress
        off = [(scale_of(d, originals[name]) - wanted[name]) ** 2 for name, d in deltas.items()]
        return Measured({"one": 0.1 + sum(off), "two": 0.2 + sum(off)}, {})

    return measure


@pytest.mark.parametrize(("wanted", "factor"), [(1.0, None), (0.8, None), (0.5, 0.5), (0.0, 0.5)])
def test_shrink_large_matrix_gets_the_factor_the_model_likes(
    wanted: float, factor: float | None
) -> None:
    deltas = StagedDeltas(changed={"large": delta("large", LARGE), "small": delta("small", SMALL)})
    # The small one would like to be 0, but is never tried.
    measure = model_that_likes({"large": wanted, "small": 0.0}, deltas)
    before = measure(deltas)
    found = shrink(deltas, before, measure, lambda *_: None)
    assert found.factors.get("large") == factor
    assert scale_of(found.deltas["large"], deltas["large"]) == pytest.approx(factor or 1.0)
    assert found.found == measure(found.deltas)


def test_shrink_that_makes_one_set_worse_is_not_kept() -> None:
    deltas = StagedDeltas(changed={"large": delta("large", LARGE)})

    def measure(tried: Mapping[str, TensorDelta], progress: Progress = silent) -> Measured:
        del progress
        scale = scale_of(tried["large"], deltas["large"])
        return Measured({"one": scale, "two": 0.1001 - 1e-4 * scale}, {})

    found = shrink(deltas, measure(deltas), measure, lambda *_: None)
    assert not found.factors
    assert found.deltas["large"] is deltas["large"]


def test_shrink_that_gains_little_is_not_kept() -> None:
    deltas = StagedDeltas(changed={"large": delta("large", LARGE)})

    def measure(tried: Mapping[str, TensorDelta], progress: Progress = silent) -> Measured:
        del progress
        scale = scale_of(tried["large"], deltas["large"])
        return Measured({"one": 0.09 + 0.01 * scale}, {})

    found = shrink(deltas, measure(deltas), measure, lambda *_: None)
    assert not found.factors


@pytest.mark.parametrize(("bits", "scale_bits"), [(2, 8), (4, 16), (16, 16)])
def test_with_rescale_scales_blocks_exactly_and_stores_the_same_bytes(
    bits: int, scale_bits: int
) -> None:
    whole = delta("w", LARGE, scale_bits, bits)
    half = with_rescale(whole, 0.5)
    assert half.terms[:-1] == whole.terms[:-1]  # the head, where there is one
    blocks, original = half.terms[-1], whole.terms[-1]
    assert isinstance(blocks, BlockDiagTerm)
    torch.testing.assert_close(blocks.to_dense(), original.to_dense() * 0.5, rtol=0, atol=0)
    for name, part in original.tensors().items():
        assert torch.equal(blocks.tensors()[name], part)
    read = BlockDiagTerm.from_parts(LARGE, blocks.params(), blocks.tensors())
    assert torch.equal(read.to_dense(), blocks.to_dense())


def test_auto_rescales_only_to_the_better_and_says_so(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_texts, "_MEASURED_TOKENS", 250)
    monkeypatch.setattr(auto_bench, "_FISHER_TOKENS", 120)
    # One that keeps the blocks of the vocabulary.
    monkeypatch.setattr(auto, "candidates", lambda costs, **_: [auto._blockdiag(2, costs)])
    out = tmp_path / "out"
    summary = compress(tiny_llama, tiny_llama_ft, out, Options(codec="auto", ratio=24.0))
    artifact = read_artifact(out)
    record, fidelity = artifact.config.options["auto"], artifact.config.fidelity
    assert summary.ratio == pytest.approx(24, rel=0.03)
    said = [note for note in summary.notes if "rescaled" in note]
    assert len(said) == len(record.get("rescaled", {}))
    (chosen,) = (trial["kl"] for trial in record["tried"])
    assert fidelity["kl_per_token"] <= chosen[fidelity["texts"]]
    assert bool(said) == (fidelity["kl_per_token"] < chosen[fidelity["texts"]])
