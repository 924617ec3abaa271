"""The soak judges answers by the digest that gave them; no server is started."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file

from benchmarks.soak import Access, Tally, choices_of, is_clean, lines, n_alike, verdict
from benchmarks.soak_variants import write_finetune
from server.tenants.directory import Directory
from tests.tiny import make_tiny

REFERENCES = {"one": ["a", "b"], "two": ["c", "b"]}


def test_answer_is_judged_by_what_its_digest_and_others_say() -> None:
    assert verdict(REFERENCES, "one", 0, "a") == "right"
    assert verdict(REFERENCES, "one", 0, "c") == "foreign"
    assert verdict(REFERENCES, "one", 0, "d") == "wrong"
    assert verdict(REFERENCES, "three", 0, "a") == "unknown"
    assert n_alike(REFERENCES) == 1
    assert n_alike({"one": ["a"], "two": ["a"], "three": ["a"]}) == 3


def test_choices_are_read_from_whole_answers_and_from_streams() -> None:
    whole = httpx.Response(200, json={"choices": [{"text": "a"}, {"text": "b"}]})
    assert choices_of(whole) == ["a", "b"]
    pieces = [(1, "x"), (0, "a"), (1, "y")]
    events = [f'data: {{"choices": [{{"index": {i}, "text": "{t}"}}]}}' for i, t in pieces]
    stream = httpx.Response(
        200,
        headers={"content-type": "text/event-stream; charset=utf-8"},
        text="\n\n".join([*events, ": keep-alive", "data: [DONE]", ""]),
    )
    assert choices_of(stream) == ["a", "xy"]


def test_finetunes_of_different_seeds_differ_in_every_matrix_of_a_layer(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    for seed in (0, 1):
        write_finetune(base, tmp_path / str(seed), seed)
    found = [load_file(tmp_path / str(seed) / "model.safetensors") for seed in (0, 1)]
    matrices = [name for name, value in found[0].items() if ".layers." in name and value.ndim == 2]
    assert matrices
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]) == (name not in matrices)
        assert one.isfinite().all()


def test_report_names_every_verdict_and_what_cannot_be_told_apart() -> None:
    tally = Tally(Counter(right=7, foreign=1), n_replaced=3, statuses=Counter({200: 8}))
    text = "\n".join(lines(tally, REFERENCES, [1_000_000], {200: 8, 404: 2}))
    assert "right 7, wrong 0, foreign 1, unknown 0" in text
    assert "statuses 8 x 200" in text
    assert "rows of the ledger: 8 x 200, 2 x 404" in text
    assert "pairs answered alike: 1" in text


def test_soak_is_clean_only_if_all_is_right_nothing_leaked_and_the_ledger_has_it() -> None:
    statuses = Counter({200: 8})
    good = Tally(Counter(right=7), n_left=2, statuses=statuses)
    assert is_clean(good, {200: 8})
    assert is_clean(good, {200: 10})  # two of those who left had their answer by then
    assert not is_clean(good, {200: 7})
    assert not is_clean(good, {200: 11})
    assert not is_clean(Tally(Counter(right=7), n_leaked=1, statuses=statuses), {200: 8})
    assert not is_clean(Tally(Counter(right=7, wrong=1), statuses=statuses), {200: 8})


def test_access_gives_each_tenant_its_own_variants_and_both_the_base(tmp_path: Path) -> None:
    access = Access.of(["a", "b", "c"])
    assert access.names == {"north": ["base", "a", "c"], "south": ["base", "b"]}
    path = tmp_path / "tenants.toml"
    path.write_text(access.file_text())
    north = Directory(path).caller(access.keys["north"]).tenant
    assert (north.name, north.may_use("a"), north.may_use("b")) == ("north", True, False)
