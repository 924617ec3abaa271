"""The whole comparison on a tiny model: real servers, real requests, rows and table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.peers import variants
from benchmarks.peers.__main__ import main
from benchmarks.peers.rows import Row, append_row, read_rows


@pytest.fixture(scope="module")
def site(
    tiny_llama: Path,
    tiny_llama_ft: Path,
    tiny_llama_ft2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two variants of each form, and an environment for transformers that is this one."""
    out = tmp_path_factory.mktemp("site")
    python = out / "transformers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    tuned = ["--finetuned", str(tiny_llama_ft), "--finetuned", str(tiny_llama_ft2)]
    common = ["--base", str(tiny_llama), "--dir", str(out), "--ratio", "8", "--rank", "4"]
    variants.main([*common, *tuned, "--count", "2"])
    return out


def command(site: Path, base: Path, out: Path, *more: str) -> list[str]:
    return [
        "--base", str(base), "--dir", str(site), "--out", str(out), "--variants", "2",
        "--loads", "6x4", "--concurrency", "3", "--window-s", "0.5", "--id-range", "10:300",
        *more,
    ]  # fmt: skip


@pytest.mark.parametrize("system", ["ours", "transformers"])
def test_main_measures_what_has_no_row_yet(
    system: str, site: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(site, tiny_llama, tmp_path / "out", "--systems", system, "--mix", "zipf")
    append_row(tmp_path / "out.csv", Row(system=system, load="6x4"))
    assert main(run) == 0
    alone, row = read_rows(tmp_path / "out.csv")
    assert (alone.key, row.key) == ((system, 0, "6x4", ""), (system, 2, "6x4", "zipf"))
    assert row.requests >= 3
    assert row.output_tokens_per_s > 0
    assert 0 < row.ttft_p50_ms <= row.ttft_p99_ms
    assert 0 < row.itl_p50_ms <= row.itl_p99_ms
    assert 10_000_000 < row.rss_ready_bytes <= 2 * row.rss_peak_bytes
    assert row.variant_disk_bytes > 0
    assert "torch" in row.versions
    assert "| zipf |" in (tmp_path / "out.md").read_text()
    capsys.readouterr()
    assert main([*run, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_main_peer_that_is_missing_fails_and_says_how_to_get_it(
    site: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(site, tiny_llama, tmp_path / "out", "--systems", "vllm")) == 1
    assert "python -m benchmarks.peers.setup vllm" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
