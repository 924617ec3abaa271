"""What is measured, in which order, and what a resumed run leaves out."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import groups_to_do, parse_args
from benchmarks.peers.cells import Cell, Load, groups_of, variant_names
from benchmarks.peers.errors import PeersError
from benchmarks.peers.rows import Row, append_row, read_rows

LOAD = Load(6, 4)
IDS = (10, 300)


def cell(mix: str, variants: int = 8, system: str = "ours") -> Cell:
    return Cell(system, variants, LOAD, mix)


def test_load_parse_reads_what_str_writes() -> None:
    assert Load.parse("512x64") == Load(512, 64)
    assert str(Load(512, 64)) == "512x64"


@pytest.mark.parametrize("text", ["64", "x64", "0x64", "64x-1", "axb", ""])
def test_load_parse_bad_text_is_refused(text: str) -> None:
    with pytest.raises(PeersError, match="PROMPTxOUTPUT"):
        Load.parse(text)


def test_groups_of_base_alone_comes_first_then_few_variants() -> None:
    groups = list(groups_of(["ours", "vllm"], [32, 8], [LOAD], ["uniform", "zipf"]))
    assert [(group.variants, group.system) for group in groups] == [
        (0, "ours"), (0, "vllm"), (8, "ours"), (8, "vllm"), (32, "ours"), (32, "vllm")
    ]  # fmt: skip
    assert [cell.mix for cell in groups[0].cells] == [""]
    assert [cell.mix for cell in groups[2].cells] == ["uniform", "zipf"]


def test_groups_of_unknown_mix_is_refused() -> None:
    with pytest.raises(PeersError, match="often"):
        list(groups_of(["ours"], [8], [LOAD], ["often"]))


def test_workload_is_the_same_for_every_system() -> None:
    ours, theirs = (
        list(islice(cell("zipf", system=name).workload(IDS).jobs(), 100)) for name in ("a", "b")
    )
    assert ours == theirs


def test_workload_warmup_has_other_prompts() -> None:
    prompts = [
        {tuple(job.prompt) for job in islice(cell("uniform").workload(IDS, warmup=w).jobs(), 200)}
        for w in (False, True)
    ]
    assert len(prompts[0]) == len(prompts[1]) == 200
    assert not prompts[0] & prompts[1]


def test_workload_uniform_asks_every_variant_equally() -> None:
    jobs = islice(cell("uniform").workload(IDS).jobs(), 80)
    assert Counter(job.model for job in jobs) == dict.fromkeys(variant_names(8), 10)


def test_workload_zipf_follows_rank_to_the_minus_three_halves() -> None:
    counts = Counter(job.model for job in islice(cell("zipf").workload(IDS).jobs(), 4000))
    weights = [rank**-1.5 for rank in range(1, 9)]
    for name, weight in zip(variant_names(8), weights, strict=True):
        assert counts[name] / 4000 == pytest.approx(weight / sum(weights), abs=0.03)


def test_workload_base_alone_asks_only_the_base() -> None:
    jobs = islice(cell("", variants=0).workload(IDS).jobs(), 20)
    assert {job.model for job in jobs} == {"base"}


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["--base", "b", "--out", str(tmp_path / "out"), "--loads", "6x4", *more]


def test_groups_to_do_cells_with_rows_are_left_out(tmp_path: Path) -> None:
    args = parse_args(arguments(tmp_path, "--systems", "ours", "--variants", "8"))
    path = tmp_path / "out.csv"
    append_row(path, Row(system="ours", load="6x4"))
    append_row(path, Row(system="ours", variants=8, load="6x4", mix="zipf"))
    (group,) = groups_to_do(args, {row.key for row in read_rows(path)})
    assert group.cells == (cell("uniform"),)


def test_groups_to_do_peft_without_adapters_is_left_out(tmp_path: Path) -> None:
    args = parse_args(arguments(tmp_path, "--systems", "peft", "--variants", "8"))
    assert [group.variants for group in groups_to_do(args, set())] == [8]


def test_groups_to_do_unknown_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeersError, match="lorax"):
        groups_to_do(parse_args(arguments(tmp_path, "--systems", "lorax")), set())


@pytest.mark.parametrize(
    ("more", "of_vllm"), [([], [0, 8]), (["--peer-variants", "16,32"], [0, 16, 32])]
)
def test_groups_to_do_peers_serve_the_fewest_variants_unless_told(
    more: list[str], of_vllm: list[int], tmp_path: Path
) -> None:
    args = parse_args(arguments(tmp_path, "--systems", "ours,vllm", "--variants", "8,32", *more))
    groups = groups_to_do(args, set())
    assert [group.variants for group in groups if group.system == "ours"] == [0, 8, 32]
    assert [group.variants for group in groups if group.system == "vllm"] == of_vllm
