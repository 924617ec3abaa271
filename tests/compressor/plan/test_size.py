"""What is said of the bytes equals what is written, from all tensors and nearly so from some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.artifact.assembly import assemble
from compressor.artifact.config import Coding, DeltaConfig
from compressor.artifact.staging import Staging
from compressor.artifact.writer import ArtifactWriter
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import TensorPair, is_unchanged, pair_tensors, to_store
from compressor.compress.encoding import Encoder
from compressor.encoders.blockdiag import BlockDiagCodec
from compressor.errors import BudgetError
from compressor.plan.settings import Planner, with_bytes
from compressor.plan.size import after_encoding, check_size, groups_by_entry, surroundings_bytes
from tests.compressor.artifacts import CONFIG

COMPANIONS = {"tokenizer.json": b"{}" * 200}
CODEC = BlockDiagCodec(bits=2, head_fraction=0.3)


@pytest.fixture
def encoder(tiny_llama: Path, tiny_llama_ft_vocab: Path, tmp_path: Path) -> Iterator[Encoder]:
    with Checkpoint(tiny_llama) as base, Checkpoint(tiny_llama_ft_vocab) as tuned:
        yield Encoder(base, tuned, Staging(tmp_path / "parts", "run"), 0, "cpu", None)


def planned(encoder: Encoder, config: DeltaConfig) -> list[TensorPair]:
    base, tuned = encoder.base, encoder.tuned
    found = (
        to_store(tuned, pair, unchanged=is_unchanged(base, tuned, pair))
        for pair in pair_tensors(base, tuned).pairs
    )
    pairs = [pair for pair in found if pair is not None]
    return Planner(CODEC, config, COMPANIONS, encoder.stage).plan(pairs)


@pytest.mark.parametrize("coding", [None, Coding("zstd", {})])
def test_overhead_and_share_give_the_bytes_of_the_artifact(
    encoder: Encoder, tmp_path: Path, coding: Coding | None
) -> None:
    n_bytes = encoder.tuned.n_bytes
    config = replace(CONFIG, finetuned_bytes=n_bytes, ratio_requested=8.0, coding=coding)
    pairs = planned(encoder, config)
    staged = [encoder.stage(pair, CODEC) for pair in pairs]
    terms = sum(CODEC.size_bytes(p.matrix_shape, p.params) for p in pairs if p.params)
    some = [s for p, s in zip(pairs, staged, strict=True) if not p.is_encoded or ".1." in p.name
            or "layers" not in p.name]  # fmt: skip
    assert len(some) < len(staged)
    with ArtifactWriter(tmp_path / "out", run_key="run") as writer:
        written = writer.write_tensors(staged, groups_by_entry(pairs), coded=coding is not None)
        made = with_bytes(config, written)
        writer.finish(made, COMPANIONS)
    true = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    entries = [tensor.entry for tensor in staged]
    card = surroundings_bytes(made, entries, COMPANIONS) + written.n_bytes - true
    assert card > 500  # the model card, which was not written here, and nothing else
    for sample, tolerance in ((staged, 1e-9), (some, 0.02)):
        counted = assemble(sample, groups_by_entry(pairs), None, coded=coding is not None)
        overhead = after_encoding(
            pairs, CODEC, sample, counted, with_bytes(config, counted), COMPANIONS
        )
        expected = overhead.fixed_bytes + overhead.share * terms - card
        assert expected == pytest.approx(true, rel=tolerance)
        assert overhead.for_terms(overhead.fixed_bytes + 10 * overhead.share) == pytest.approx(10)


def test_check_size_refuses_what_missed_and_names_a_remedy() -> None:
    coded = Coding("zstd", {})
    config = replace(CONFIG, finetuned_bytes=1000, ratio_requested=10.0, coding=coded)
    check_size(config, None, 102)
    check_size(config, None, 60)  # coding may leave less than can be spent
    with pytest.raises(BudgetError, match="nearest possible here is"):
        check_size(config, None, 110)
    with pytest.raises(BudgetError, match="nearest possible here is"):
        check_size(replace(config, coding=None), None, 60)
    with pytest.raises(BudgetError, match=r"ask for a ratio of 10\.3"):
        check_size(config, 99, 100)
