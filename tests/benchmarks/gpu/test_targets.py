"""The last table of a run: what was measured beside what is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.predict import BANDWIDTH
from benchmarks.gpu.report import Report, facts
from benchmarks.gpu.scope import FULL
from benchmarks.gpu.targets import target_table, targets


def step(report: Report, ratio: int, variants: int, per_floor: float, of_base: float) -> None:
    shape = {"ratio": ratio, "quant": None, "rows": 32, "variants": variants}
    report.fact("step", **shape, per_floor=per_floor, of_base=of_base)


def test_worst_loads_and_all_of_a_codecs_bytes_count(tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    report = Report(out)
    step(report, 32, 0, 1.25, 1.0)
    step(report, 32, 32, 1.4, 0.55)
    step(report, 128, 32, 1.4, 0.9)
    report.fact("step", ratio=256, quant="int8", rows=32, variants=32, per_floor=2.0, of_base=0.1)
    kernel = {"part": "4bit-s8", "expected_s": 1e-5, "bandwidth": BANDWIDTH}
    for share, variants in ((1.0, 32), (0.5, 32), (0.1, 8), (0.1, 0)):
        spec = {"name": "blockdiag decode", "variants": variants, "n_bytes": 8600}
        report.fact("kernel", **kernel, **spec, seconds=8600 / BANDWIDTH / share)
    for shown_s, ratio in ((0.8, 1.1), (1.1, 1.15)):
        report.fact("load", ratio=32, shown_s=shown_s, p99_ratio=ratio)
    found = {t.name: t for t in targets(FULL, out)}
    assert [t.measured for t in found.values()] == pytest.approx(
        [1.25, 0.55, 0.9, None, 2 / 3, 1.1, 1.15]
    )
    target_table(FULL, report, out)
    met = [line.split("|")[-2].strip() for line in out.read_text().splitlines()[-7:]]
    assert met == ["yes", "NO", "yes", "", "NO", "NO", "yes"]
    expected = [t.expected for t in found.values()][:4]
    assert expected == pytest.approx([1.35, 0.56, 0.80, 0.86], abs=0.006)  # README


def test_run_without_facts_says_not_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    target_table(FULL, Report(out), out)
    assert out.read_text().count("not measured") == 6
    assert facts(out, "step") == []
