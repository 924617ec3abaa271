"""True sizes with entropy coding: never beyond what is asked for, near it, and no bytes lost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import compressor.plan.settings as settings
from compressor.artifact.assembly import TensorBytes
from compressor.artifact.reader import Artifact, read_artifact
from compressor.artifact.writer import ArtifactWriter
from compressor.cli.app import app
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError
from compressor.plan.size import Overhead
from tests.tiny import make_tiny, perturb

RATIO = 24.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = make_tiny("llama", folder / "base", hidden_size=128, intermediate_size=512)
    return base, perturb(base, folder / "tuned")


def make(pair: tuple[Path, Path], out: Path, options: Options) -> Artifact:
    compress(*pair, out, options)
    artifact = read_artifact(out)
    assert artifact.n_bytes == sum(file.stat().st_size for file in out.iterdir())
    return artifact


def fill(artifact: Artifact) -> float:
    """Bytes over the bytes asked for."""
    assert artifact.config.ratio_requested is not None
    return artifact.n_bytes * artifact.config.ratio_requested / artifact.config.finetuned_bytes


@pytest.mark.parametrize("bits", [2, 4])
def test_coded_artifact_fills_what_is_asked_for_with_more_than_fits_plain(
    pair: tuple[Path, Path], tmp_path: Path, bits: int
) -> None:
    given = {"bits": bits}
    options = Options(codec="blockdiag", ratio=RATIO, codec_options=given, entropy="zstd")
    coded = make(pair, tmp_path / "coded", options)
    plain = make(pair, tmp_path / "plain", replace(options, entropy="none"))
    assert coded.config.coding is not None
    assert plain.config.coding is None
    assert 0.97 < fill(coded) <= 1.0
    before = sum(coded.config.coding.raw_bytes.values())
    assert before > 1.02 * sum(plain.config.bytes.values())
    assert before > sum(coded.config.bytes.values())


def test_without_coding_the_configuration_names_no_coder(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    make(pair, tmp_path / "plain", Options(codec="blockdiag", ratio=RATIO, entropy="none"))
    record = json.loads((tmp_path / "plain" / "delta_config.json").read_bytes())
    assert record["format_version"] == 3
    assert "coding" not in record


@pytest.mark.parametrize("hoped", [0.6, 1.0])
def test_sample_that_was_not_typical_is_followed_by_one_better_pass(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hoped: float
) -> None:
    """From a plan that is far too large, and from one that leaves bytes unused."""
    found, sizes = [], []
    real = settings.after_encoding

    def misled(*arguments: Any) -> Overhead:
        found.append(real(*arguments))
        return replace(found[-1], share=hoped) if len(found) == 1 else found[-1]

    write = ArtifactWriter.write_tensors

    def writing(writer: ArtifactWriter, *given: Any, **named: Any) -> TensorBytes:
        written = write(writer, *given, **named)
        sizes.append(written.n_bytes)
        return written

    monkeypatch.setattr(settings, "after_encoding", misled)
    monkeypatch.setattr(ArtifactWriter, "write_tensors", writing)
    artifact = make(pair, tmp_path / "out", Options(codec="blockdiag", ratio=RATIO, entropy="zstd"))
    assert 0.98 < fill(artifact) < 1.01
    first, second = sizes
    assert (first > second) == (hoped < 1)


def test_first_pass_that_meets_the_ratio_is_the_last(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    stages = Counter[str]()

    def progress(stage: str, done: int, total: int) -> None:
        stages[stage] += done == total

    for entropy in ("zstd", "none"):
        options = Options(codec="blockdiag", ratio=RATIO, entropy=entropy)
        compress(*pair, tmp_path / entropy, options, progress)
    assert stages["encode"] == stages["sample"] == 2


@pytest.mark.slow
def test_auto_plans_for_the_coded_size(pair: tuple[Path, Path], tmp_path: Path) -> None:
    artifact = make(pair, tmp_path / "out", Options(codec="auto", ratio=RATIO, entropy="zstd"))
    assert artifact.config.coding is not None
    assert 0.97 < fill(artifact) <= 1.0


def test_ratio_that_fits_only_without_coding_gives_a_smaller_artifact(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Whole matrices of 2 bits: the codec can spend no more, whatever coding sets free."""
    options = Options(codec="blockdiag", ratio=14.4, codec_options={"bits": 2}, entropy="none")
    plain = make(pair, tmp_path / "plain", options)
    assert max(e.terms[0].params["n_blocks"] for e in plain.config.tensors if e.terms) == 1
    coded = make(pair, tmp_path / "coded", replace(options, entropy="zstd"))
    assert fill(coded) < 0.97


def test_unknown_coder_is_refused() -> None:
    with pytest.raises(InputError, match="zstd or none"):
        Options(entropy="brotli")


def test_inspect_shows_bytes_before_and_after_coding(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["--codec", "blockdiag", "--ratio", str(RATIO), "--entropy", "zstd", "-q"]
    out = tmp_path / "out"
    made = CliRunner().invoke(app, ["compress", *map(str, (*pair, out)), *arguments])
    assert made.exit_code == 0, made.output
    shown = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    config = read_artifact(out).config
    assert config.coding is not None
    assert "before coding" in shown
    for table in (config.bytes, config.coding.raw_bytes):
        assert all(f"{n_bytes:,}" in shown for n_bytes in table.values())
    record = json.loads(CliRunner().invoke(app, ["inspect", "--json", str(out)]).stdout)
    assert record["coding"] == {"coder": "zstd", "raw_bytes": config.coding.raw_bytes}
    assert sum(record["groups"].values()) == record["bytes"]


def test_entropy_none_on_the_command_line_codes_nothing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["--codec", "blockdiag", "--ratio", str(RATIO), "--entropy", "none", "-q"]
    made = CliRunner().invoke(app, ["compress", *map(str, (*pair, tmp_path / "o")), *arguments])
    assert made.exit_code == 0, made.output
    assert read_artifact(tmp_path / "o").config.coding is None
