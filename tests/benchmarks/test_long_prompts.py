"""The long-prompt benchmark against the small real server of the load tool's tests."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.child import free_port
from benchmarks.long_prompts import Phase, main
from tests.benchmarks.test_load import SERVER


@pytest.mark.parametrize("bad", [False, True])
def test_main_measures_every_rate_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: bool
) -> None:
    script, out = tmp_path / "fake_server.py", tmp_path / "out.json"
    script.write_text(SERVER)
    port = free_port()
    status = main(
        [
            "--url", f"http://127.0.0.1:{port}",
            "--spawn", shlex.join([sys.executable, str(script), str(port)]),
            "--rate", "0", "--rate", "20", "--duration-s", "0.4", "--repeats", "2",
            "--streams", "3", "--max-tokens", "6", "--long-tokens", "50",
            "--json", str(out), "--log", str(tmp_path / "log"),
            *(("--model", "bad") if bad else ()),
        ]
    )  # fmt: skip
    assert status == int(bad)
    none, some = json.loads(out.read_text())["phases"]
    assert (none["rate"], none["long_sent"], none["long_ttft_ms"]) == (0, 0, None)
    assert some["long_sent"] == 16
    if bad:
        assert some["errors"][0].startswith("HTTP 404")
        assert some["ratio"] is None
    else:
        assert some["long_answered"] >= 8
        assert some["ratio"] >= 1
        assert some["errors"] == none["errors"] == []
    assert "| 20 |" in capsys.readouterr().out


def test_figures_ratio_is_p99_over_p50() -> None:
    phase = Phase(1.0, wall_s=2.0, gaps_s=[0.1] * 98 + [0.3] * 2, n_short_tokens=100)
    figures = phase.figures()
    assert figures["between_tokens_ms"]["p50"] == pytest.approx(100)
    assert figures["ratio"] == pytest.approx(3.0)
    assert figures["short_tokens_per_s"] == 50
