"""One tensor from the checkpoints to the staging folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.artifact.staging import Staging
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import TensorPair, pair_tensors, to_store
from compressor.compress.encoding import Encoder, relative_error
from compressor.encoders.blockdiag import BlockDiagCodec
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import TensorSource

NAME = "model.layers.0.mlp.up_proj.weight"


def stored(base: Checkpoint, tuned: Checkpoint, name: str) -> TensorPair:
    (pair,) = (pair for pair in pair_tensors(base, tuned).pairs if pair.name == name)
    found = to_store(tuned, pair, unchanged=False)
    assert found is not None
    return found


def test_stage_each_setting_is_encoded_once_and_found_by_a_later_run(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = BlockDiagCodec(bits=4)
    encoded = []
    encode = BlockDiagCodec.encode
    monkeypatch.setattr(
        BlockDiagCodec,
        "encode",
        lambda self, *given: encoded.append(given[2]) or encode(self, *given),
    )
    with Checkpoint(tiny_llama) as base, Checkpoint(tiny_llama_ft) as tuned:
        pair = stored(base, tuned, NAME)
        settings = [codec.settings(0, n_blocks) for n_blocks in (2, 4)]
        for _ in range(2):
            staging = Staging(tmp_path / "parts", "run")
            encoder = Encoder(base, tuned, staging, 0, "cpu", None)
            for params in (*settings, *settings):
                staged = encoder.stage(replace(pair, params=params), codec)
                (term,) = staged.read().terms
                assert term.params()["n_blocks"] == params["n_blocks"]
    assert encoded == settings


def test_stage_changed_replaces_what_an_earlier_run_left(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    with Checkpoint(tiny_llama) as base, Checkpoint(tiny_llama_ft) as tuned:
        pair = stored(base, tuned, "model.norm.weight")
        staging = Staging(tmp_path / "parts", "run")
        encoder = Encoder(base, tuned, staging, 0, "cpu", None)
        before = encoder.stage(pair, BlockDiagCodec())
        delta = before.read()
        assert delta.exact is not None
        for value in (1.0, 2.0):
            exact = replace(delta.exact, values=torch.full_like(delta.exact.values, value))
            after = encoder.stage_changed(replace(delta, exact=exact), pair)
        found = after.read().exact
        assert found is not None
        assert found.values.eq(2.0).all()
        assert before.read().exact is not None
        assert len(list((tmp_path / "parts").glob("*.part"))) == 2


def test_relative_error_in_strips_equals_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(70, 40)
    codec = make_encoder("blockdiag")
    source = TensorSource(matrix)
    terms = codec.encode("w", source, codec.fit((70, 40), 300), 0)
    whole = relative_error(terms, source)
    monkeypatch.setattr("compressor.compress.encoding.CHUNK_ELEMENTS", 400)
    assert relative_error(terms, source) == pytest.approx(whole, rel=1e-6)
    exact = float((terms[0].to_dense() - matrix).norm() / matrix.norm())
    assert whole == pytest.approx(exact, rel=1e-5)
    assert relative_error((), TensorSource(torch.zeros(3, 3))) == 0.0
