from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor.auto.bench as auto_bench
import compressor.auto.search as auto
import compressor.auto.shrink as auto_shrink
import compressor.auto.texts as auto_texts
from compressor.artifact import staging
from compressor.artifact.config import DeltaConfig
from compressor.artifact.reader import read_artifact
from compressor.artifact.staging import StagedDeltas
from compressor.auto.allocate import HeadCosts
from compressor.auto.goal import Goal
from compressor.auto.search import PLAIN
from compressor.auto.self_written import SELF
from compressor.auto.texts import BUILT_IN, OWN, spread
from compressor.codecs import BlockDiagTerm, RowsTerm
from compressor.compress.options import Options, Summary
from compressor.compress.pipeline import compress
from compressor.encoders.blockdiag import BlockDiagCodec
from compressor.errors import BudgetError, InputError
from compressor.measure.comparison import n_predicted
from compressor.measure.samples import Sample

Pair = tuple[Path, Path]


@pytest.fixture(autouse=True, scope="module")
def few_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_texts, "_MEASURED_TOKENS", 250)
        patch.setattr(auto_bench, "_FISHER_TOKENS", 120)
        yield


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tiny_llama_ft: Path) -> Pair:
    return tiny_llama, tiny_llama_ft


@pytest.fixture(scope="module")
def at_8(pair: Pair, few_tokens: None, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """What ratio 8 gives without texts of the user's."""
    return run(pair, tmp_path_factory.mktemp("at-8") / "out", ratio=8.0)[0]


@pytest.fixture(scope="module")
def at_12(
    pair: Pair, few_tokens: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Summary, DeltaConfig]:
    """What ratio 12 gives without texts of the user's."""
    return run(pair, tmp_path_factory.mktemp("at-12") / "out", ratio=12.0)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.jsonl"
    lines = (f"the {n} quick foxes jump over {n + 3} lazy dogs" for n in range(12))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


def run(pair: Pair, out: Path, **options: object) -> tuple[Summary, DeltaConfig]:
    summary = compress(*pair, out, Options(codec="auto", **options))  # type: ignore[arg-type]
    return summary, read_artifact(out).config


def test_auto_ratio_is_met_and_the_best_of_what_was_tried_is_stored(
    pair: Pair, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_shrink, "_SHARE", 2.0)  # nothing changes after the choice
    summary, config = run(pair, tmp_path / "out", ratio=8.0, calibration=own)
    assert summary.ratio == pytest.approx(8, rel=0.03)
    record = config.options["auto"]
    tried = record["tried"]
    assert [trial["setting"].split()[0] for trial in tried] == ["blockdiag", "blockdiag", "lowrank"]
    for trial in tried:
        assert trial["kl"].keys() == {OWN, BUILT_IN}
    best = min(tried, key=lambda trial: trial["kl"][OWN] * trial["kl"][BUILT_IN])
    assert config.codec == best["setting"].split()[0]
    assert config.fidelity["kl_per_token"] == best["kl"][OWN]
    assert config.fidelity["texts"] == OWN
    assert config.fidelity[BUILT_IN]["kl_per_token"] == best["kl"][BUILT_IN]
    assert sum("tried" in note for note in summary.notes) == 3
    assert any(best["setting"] in note and "chose" in note for note in summary.notes)


def test_auto_record_is_what_an_evaluation_of_the_artifact_finds(
    pair: Pair, own: Path, tmp_path: Path
) -> None:
    from compressor.checkpoint.files import Checkpoint

    _, config = run(pair, tmp_path / "out", ratio=10.0, calibration=own)
    with Checkpoint(pair[0]) as base, Checkpoint(pair[1]) as tuned:
        bench = auto_bench.Bench(base, tuned, own)
        artifact = read_artifact(tmp_path / "out")
        found = bench.measure({delta.name: delta for delta in artifact.tensors})
    assert found.kl[OWN] == pytest.approx(config.fidelity["kl_per_token"], rel=1e-3)


def test_auto_tells_of_all_it_does_and_each_stage_to_its_end(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_shrink, "_SHARE", 0.01)
    told: dict[str, list[float]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        told.setdefault(stage, []).append(done / total)

    compress(*pair, tmp_path / "out", Options(codec="auto", ratio=12.0), progress)
    tries = [f"try {n} of 4" for n in (1, 2, 3, 4)]
    before = ["compare", "load", SELF, "fine-tune", "base", "vocabulary", "gradients", "survey"]
    assert list(told) == [*before, *tries, "shrink", "write"]
    for stage, shares in told.items():
        assert shares == sorted(shares), stage
        assert shares[-1] == 1, stage
    assert len(set(told[SELF])) > 24, "every token that is drawn"
    assert len(set(told["gradients"])) > 2, "every text"
    assert len(set(told["shrink"])) > 4, "every matrix, and within it"


def test_auto_tuning_is_told_and_so_is_a_search(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_bench, "_TUNING_TOKENS", 10)
    file = tmp_path / "own.txt"
    file.write_text("".join(f"the {n} foxes jump over {n + 3} dogs\n" for n in range(24)))
    told: dict[str, bool] = {}

    def progress(stage: str, done: int, total: int) -> None:
        told[stage] = done == total

    options = Options(codec="auto", max_kl=1.0, calibration=file)
    compress(*pair, tmp_path / "out", options, progress)
    assert SELF not in told
    assert "try 1 of up to 12" in told
    assert list(told)[-4:] == ["shrink", "targets", "tune", "write"]
    assert all(told.values())


def test_auto_same_inputs_give_identical_bytes(pair: Pair, at_8: Summary, tmp_path: Path) -> None:
    again, _ = run(pair, tmp_path / "again", ratio=8.0)
    assert again.digest == at_8.digest


def test_auto_without_texts_also_measures_on_what_the_finetune_writes(
    at_12: tuple[Summary, DeltaConfig],
) -> None:
    _, config = at_12
    record = config.options["auto"]
    assert record["tokens"].keys() == {BUILT_IN, SELF}
    assert config.fidelity["texts"] == BUILT_IN
    assert config.fidelity[SELF]["n_tokens"] == record["tokens"][SELF] > 0
    tried = {trial["setting"]: trial["kl"] for trial in record["tried"]}
    shared = "blockdiag of 2 bits, heads where they pay"
    finer = "blockdiag of 4 bits, heads where they pay"
    assert list(tried) == [shared, f"{shared}, alone for the vocabulary", finer, PLAIN]
    assert config.fidelity[SELF]["kl_per_token"] <= tried[PLAIN][SELF]


def test_auto_vocabulary_without_blocks_is_a_head_and_the_rows_that_moved_most(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only(costs: dict[str, HeadCosts], *, has_own_texts: bool) -> list[auto._Candidate]:
        costs = {name: replace(c, left_out=(0.0,) * len(c.left_out)) for name, c in costs.items()}
        return [auto._blockdiag(2, costs, leaves_out=True)]

    monkeypatch.setattr(auto, "candidates", only)
    summary, _ = run(pair, tmp_path / "out", ratio=14.0)
    assert summary.ratio == pytest.approx(14, rel=0.03)
    found = {delta.name: delta.terms for delta in read_artifact(tmp_path / "out").tensors}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = found.pop(name)[-1]
        assert isinstance(rows, RowsTerm)
        assert len(rows.index) >= 1
    assert all(isinstance(terms[-1], BlockDiagTerm) for terms in found.values() if terms)


def measured(label: str, built_in: float, own_writing: float) -> auto._Trial:
    kl = {BUILT_IN: built_in, SELF: own_writing}
    found = auto_bench.Measured(kl, dict.fromkeys(kl, 1.0))
    candidate = auto._Candidate(label, BlockDiagCodec(), None)
    return auto._Trial(candidate, 8.0, [], StagedDeltas(), found)


def test_best_never_says_the_finetunes_own_words_worse_than_plain_sampling() -> None:
    plain, worse = measured(PLAIN, 0.5, 0.10), measured("worse", 0.01, 0.11)
    better = measured("better", 0.4, 0.09)
    assert auto._best([worse, plain]) is plain
    assert auto._best([worse, better, plain]) is better
    assert auto._best([worse, better]) is worse  # with texts of the user's: the mean alone


def test_auto_max_bytes_is_not_exceeded(pair: Pair, tmp_path: Path) -> None:
    summary, _ = run(pair, tmp_path / "out", max_bytes=50_000)
    assert 0.95 * 50_000 < summary.n_bytes <= 50_000


def test_auto_max_kl_is_kept_with_a_ratio_above_the_smallest(pair: Pair, tmp_path: Path) -> None:
    loose, config = run(pair, tmp_path / "a", ratio=6.0)
    target = 1.05 * config.fidelity["kl_per_token"]
    summary, config = run(pair, tmp_path / "b", max_kl=target)
    assert config.fidelity["kl_per_token"] <= target
    assert summary.ratio > 0.5 * loose.ratio
    failed = [t for t in config.options["auto"]["tried"] if t["kl"][BUILT_IN] > target]
    assert failed
    assert all(trial["ratio"] > summary.ratio / 1.03 for trial in failed)


def test_auto_max_kl_out_of_reach_says_what_was_reached(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="was not reached: at ratio"):
        run(pair, tmp_path / "out", max_kl=1e-8)
    assert not (tmp_path / "out").exists()


def test_auto_too_heavy_for_the_bytes_warns(at_12: tuple[Summary, DeltaConfig]) -> None:
    summary, _ = at_12
    assert any(note.startswith("warning: the KL is") for note in summary.notes)


def test_auto_model_too_large_to_run_takes_fixed_settings_and_says_why(
    pair: Pair, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_bench, "_CPU_PARAMETERS", 1000)
    monkeypatch.setattr(auto_bench.torch.cuda, "is_available", lambda: False)
    summary, config = run(pair, tmp_path / "out", ratio=8.0)
    assert summary.ratio == pytest.approx(8, rel=0.03)
    assert "too many to run without a GPU" in config.options["auto"]["basis"]
    assert "too many to run without a GPU" in summary.notes[0]
    assert config.fidelity == {}
    with pytest.raises(InputError, match=r"cannot measure on .*own\.jsonl"):
        run(pair, tmp_path / "other", ratio=8.0, calibration=own)
    with pytest.raises(InputError, match="--max-kl needs the model"):
        run(pair, tmp_path / "other", max_kl=0.1)


def test_auto_with_options_of_a_codec_raises(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="auto chooses bits itself"):
        run(pair, tmp_path / "out", codec_options={"bits": 4})


def test_auto_impossible_ratio_raises(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="nearest possible"):
        run(pair, tmp_path / "out", ratio=500.0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"ratio": 8.0, "max_kl": 0.1}, "one of"),
        ({"max_bytes": 0}, "must be positive"),
        ({"max_kl": float("nan")}, "positive number"),
    ],
)
def test_goal_contradictory_or_unusable_raises(options: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Goal(**options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"codec": "blockdiag", "max_kl": 0.1}, "are for --codec auto"),
        ({"device": "tpu"}, "cpu or cuda"),
    ],
)
def test_options_that_do_not_go_together_raise(options: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Options(**options)


def test_spread_takes_evenly_up_to_the_tokens_wanted() -> None:
    samples = [Sample((n, n, n), (True,) * 3) for n in range(100)]
    chosen = spread(samples, 40)
    assert [sample.ids[0] for sample in chosen] == list(range(0, 100, 5))
    assert sum(map(n_predicted, chosen)) == 40
    assert spread(samples[:3], 10_000) == samples[:3]
    assert len(spread(samples, 1)) == 1


def test_auto_never_holds_more_than_a_few_tensors_of_its_trials(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    build = staging.build_delta

    def counting(*arguments: Any) -> Any:
        nonlocal alive, most
        delta = build(*arguments)
        alive = [known for known in alive if known() is not None]
        alive += [weakref.ref(t.scales) for t in delta.terms if isinstance(t, BlockDiagTerm)]
        most = max(most, len(alive))
        return delta

    monkeypatch.setattr(staging, "build_delta", counting)
    run(pair, tmp_path / "out", ratio=8.0)
    n_terms = sum(len(delta.terms) for delta in read_artifact(tmp_path / "out").tensors)
    assert 0 < most <= 4 < n_terms


def test_auto_interrupted_takes_up_what_its_trials_encoded(
    pair: Pair, at_8: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, calls = staging.Staging.add, []

    def failing(self: staging.Staging, key: str, *arguments: Any) -> staging.StagedTensor:
        calls.append(key)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return add(self, key, *arguments)

    monkeypatch.setattr(staging.Staging, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        run(pair, tmp_path / "out", ratio=8.0)
    resumed, _ = run(pair, tmp_path / "out", ratio=8.0)
    assert resumed.digest == at_8.digest
    assert not set(calls[:39]) & set(calls[40:])
