"""Statistics of a cell, the CSV file and the table made of it, all by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.child import ServerChild
from benchmarks.load import Outcome
from benchmarks.peers.errors import PeersError
from benchmarks.peers.measure import check, statistics, window
from benchmarks.peers.report import markdown, variant_memory_bytes, write_report
from benchmarks.peers.rows import Row, append_row, read_rows

ROW = Row(
    system="ours",
    variants=8,
    load="64x64",
    mix="uniform",
    concurrency=32,
    requests=96,
    window_s=10.0,
    output_tokens_per_s=200.0,
    ttft_p50_ms=100.0,
    ttft_p99_ms=900.0,
    itl_p50_ms=20.0,
    itl_p99_ms=80.0,
    rss_half_bytes=1_000_000_000,
    rss_warm_bytes=1_020_000_000,
    rss_peak_bytes=2_000_000_000,
    variant_disk_bytes=4_200_000,
    versions="torch 2",
)
OURS = replace(ROW, variants=0, mix="", output_tokens_per_s=250.0, variant_disk_bytes=0)
VLLM = replace(OURS, system="vllm", output_tokens_per_s=400.0, rss_warm_bytes=900_000_000)


def outcome(*, tokens: int, chunks: list[float], start: float = 0.0) -> Outcome:
    return Outcome("a", start, chunks[-1], chunks, n_tokens=tokens, n_prompt_tokens=5)


def test_statistics_counts_only_what_arrived_in_the_window() -> None:
    inside = outcome(tokens=4, chunks=[1.0, 2.0, 3.0, 4.0])
    across = outcome(tokens=4, chunks=[9.0, 11.0], start=8.0)  # two tokens a piece
    figures = statistics([inside, across], start_s=0.0, window_s=10.0, wall_s=11.0)
    assert figures["output_tokens_per_s"] == pytest.approx((4 + 2) / 10)
    assert figures["drained_tokens_per_s"] == pytest.approx(8 / 11)
    assert figures["requests"] == 2
    assert figures["ttft_p50_ms"] == pytest.approx(1000)
    assert figures["itl_p50_ms"] == pytest.approx(1000)
    assert figures["itl_p99_ms"] == pytest.approx(1000 + 0.97 * 1000)


@pytest.mark.parametrize(("shortest_s", "expected_s"), [(2.0, 5.0), (10.0, 10.0)])
def test_window_lasts_until_enough_were_answered(shortest_s: float, expected_s: float) -> None:
    answered = [outcome(tokens=1, chunks=[at]) for at in (12.0, 4.0, 7.0)]
    assert window(answered, start_s=2.0, shortest_s=shortest_s, at_least=2) == expected_s


def test_statistics_one_piece_each_has_no_gaps() -> None:
    figures = statistics([outcome(tokens=4, chunks=[1.0])], 0.0, 10.0, 10.0)
    assert math.isnan(figures["itl_p50_ms"])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"error": "HTTP 500"}, "HTTP 500"),
        ({"n_tokens": 3}, "3 tokens instead of 4"),
        ({"n_prompt_tokens": 6}, "read 6 prompt tokens"),
    ],
)
def test_check_anything_but_what_was_asked_is_an_error(
    broken: dict[str, object], message: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("the reason\n")
    child = ServerChild([], "http://127.0.0.1:1", log)
    good = outcome(tokens=4, chunks=[1.0])
    check([good], 5, 4, child)
    bad = outcome(tokens=4, chunks=[1.0])
    for name, value in broken.items():
        setattr(bad, name, value)
    with pytest.raises(PeersError, match=message) as error:
        check([good, bad], 5, 4, child)
    assert "the reason" in str(error.value)


def test_rows_read_back_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "rows.csv"
    assert read_rows(path) == []
    for row in (ROW, VLLM):
        append_row(path, row)
    again = read_rows(path)
    assert [row.key for row in again] == [ROW.key, VLLM.key]
    assert again[0].output_tokens_per_s == 200.0
    assert again[0].rss_peak_bytes == 2_000_000_000
    assert math.isnan(again[0].wall_s)


@pytest.mark.parametrize(
    "text", ["system,load\nours,64x64\n", "{header}\nours,eight" + "," * 23 + "\n"]
)
def test_read_rows_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.csv"
    append_row(path, ROW)
    header = path.read_text().splitlines()[0]
    path.write_text(text.replace("{header}", header))
    with pytest.raises(PeersError, match=r"other columns|does not parse"):
        read_rows(path)


def test_markdown_line_has_ratios_to_both_bases() -> None:
    (line,) = [x for x in markdown([ROW, OURS, VLLM]).splitlines() if "| uniform |" in x]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "ours", "8", "uniform", "96", "200", "0.80", "0.50",
        "100 / 900", "20 / 80", "2000", "4.2", "5.0",
    ]  # fmt: skip


def test_markdown_without_the_baselines_shows_no_ratio() -> None:
    (line,) = [x for x in markdown([ROW]).splitlines() if "| uniform |" in x]
    assert line.count("| - ") == 2


def test_markdown_other_load_is_not_a_baseline() -> None:
    text = markdown([ROW, replace(OURS, load="512x64")])
    (line,) = [x for x in text.splitlines() if "| uniform |" in x]
    assert "| 0.80 |" not in line
    assert text.count("tokens in") == 2


def test_variant_memory_lazy_counts_the_second_half() -> None:
    assert variant_memory_bytes(ROW, None) == 5_000_000


def test_variant_memory_preloaded_is_against_the_base_alone() -> None:
    loaded = replace(VLLM, variants=8, rss_warm_bytes=1_060_000_000)
    assert variant_memory_bytes(loaded, VLLM) == 20_000_000
    assert math.isnan(variant_memory_bytes(loaded, None))


def test_variant_memory_swapped_checkpoints_have_none() -> None:
    assert math.isnan(variant_memory_bytes(replace(ROW, system="transformers"), OURS))


def test_write_report_writes_beside_the_csv(tmp_path: Path) -> None:
    append_row(tmp_path / "x.csv", ROW)
    assert write_report(tmp_path / "x.csv") == tmp_path / "x.md"
    assert "Versions: ours: torch 2." in (tmp_path / "x.md").read_text()
