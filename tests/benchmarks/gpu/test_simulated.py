"""Every section on the simulated GPU: devices that do not meet, what cannot be captured."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import graph_timing
from benchmarks.gpu.__main__ import sections
from benchmarks.gpu.graph_timing import NotCapturable, device_seconds
from benchmarks.gpu.report import Report
from benchmarks.gpu.scope import SMALL
from benchmarks.gpu.targets import target_table
from tests.simulated_cuda import simulated_cuda

SCOPE = replace(SMALL, device=torch.device("cuda"), n_steps=2, variants=(1, 2))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_timing, "FLUSH_BYTES", 1 << 10)
    for name, value in {"WARM_UPS": 1, "N_REPLAYS": 2, "MOST": 2, "FEWEST": 1}.items():
        monkeypatch.setattr(graph_timing, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(sections(SCOPE)))
def test_section_runs_on_the_simulated_device(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    with simulated_cuda():
        went_right = sections(SCOPE)[name].run(SCOPE, Report(out))
    text = out.read_text()
    assert went_right, text
    assert "FAILED" not in text
    target_table(SCOPE, Report(out), out)


def test_time_is_of_the_launch_without_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    flush_s, launch_s = 0.05, 0.02
    with simulated_cuda() as gpu:

        def takes(seconds: float) -> None:
            time.sleep(seconds)
            if gpu.graph is not None:
                gpu.graph.steps.append(lambda: time.sleep(seconds))

        monkeypatch.setattr(torch, "amax", lambda *_, **__: takes(flush_s))
        assert device_seconds(lambda: takes(launch_s)) == pytest.approx(launch_s, abs=0.01)


def test_what_no_graph_can_hold_says_so() -> None:
    with simulated_cuda():
        x = torch.ones(4, device="cuda")
        with pytest.raises(NotCapturable, match="capture"):
            device_seconds(x.sum().item)
        assert device_seconds(lambda: x.add_(1.0)) != 0  # capturing goes on working
