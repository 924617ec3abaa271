from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressor.auto.bench as auto_bench
import compressor.auto.texts as auto_texts
import compressor.auto.tune as auto_tune
from compressor.artifact.reader import read_artifact
from compressor.artifact.staging import StagedDeltas
from compressor.auto.kept import Kept, Measured, digest, is_better
from compressor.auto.texts import BUILT_IN, OWN, calibration_sets
from compressor.auto.tune import Tuned, Tuner
from compressor.checkpoint.files import Checkpoint
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.measure.fidelity import merge_into
from compressor.measure.samples import Sample, load_tokenizer
from compressor.measure.swapped_model import SwappedModel

Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_texts, "_MEASURED_TOKENS", 250)
    monkeypatch.setattr(auto_bench, "_FISHER_TOKENS", 120)
    monkeypatch.setattr(auto_tune, "STEPS", 6)
    monkeypatch.setattr(auto_tune, "CHECK_EVERY", 2)
    monkeypatch.setattr(auto_tune, "_TOKENS", 60)


@pytest.fixture
def pair(tiny_llama: Path, tiny_llama_ft: Path) -> Pair:
    return tiny_llama, tiny_llama_ft


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.jsonl"
    lines = (f"the {n} quick foxes jump over {n + 3} lazy dogs" for n in range(40))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.fixture
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = (tuple(torch.randint(3, 60, (12,), generator=generator).tolist()) for _ in range(16))
    return [Sample(ids, (True,) * len(ids)) for ids in rows]


def test_tuner_lowers_the_kl_it_tunes_on_and_gives_the_model_back(
    pair: Pair, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_tune, "_RATE", 0.03)
    monkeypatch.setattr(auto_tune, "STEPS", 12)
    monkeypatch.setattr(auto_tune, "CHECK_EVERY", 12)
    compress(*pair, tmp_path / "delta", Options(ratio=8.0, codec_options={"head_fraction": 0.2}))
    artifact = read_artifact(tmp_path / "delta")
    deltas = StagedDeltas(changed={delta.name: delta for delta in artifact.tensors})
    seen: list[Tuned] = []
    with Checkpoint(pair[0]) as base, Checkpoint(pair[1]) as tuned:
        model = SwappedModel(base, tuned)
        before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        tuner = Tuner(model, {"some": samples})
        first = oracle_kl(pair, base, list(deltas.values()), samples)
        tuner.run(deltas, {"some": first}, lambda *_: None, seen.append)
        for name, parameter in model.module.named_parameters():
            assert torch.equal(parameter, before[name])
            assert parameter.requires_grad
            assert parameter.grad is None
        (last,) = seen
        assert (last.steps, last.of) == (12, 12)
        moved = [name for name in deltas if last.deltas[name] is not deltas[name]]
        assert moved == [name for name in deltas if name.endswith("norm.weight")]
        for name in moved:
            old, new = deltas[name].exact, last.deltas[name].exact
            assert old is not None
            assert new is not None
            assert new.values.dtype == old.values.dtype
            assert new.values.shape == old.values.shape
            assert not torch.equal(new.values, old.values)
        assert oracle_kl(pair, base, list(last.deltas.values()), samples) < 0.97 * first


def test_tuner_without_vectors_does_nothing(pair: Pair, samples: list[Sample]) -> None:
    with Checkpoint(pair[0]) as base, Checkpoint(pair[1]) as tuned:
        tuner = Tuner(SwappedModel(base, tuned), {"some": samples})
        seen: list[Tuned] = []
        tuner.run(StagedDeltas(), {"some": 0.1}, lambda *_: None, seen.append)
    assert seen == []


def test_gradients_are_the_same_however_the_texts_are_cut(
    pair: Pair, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [Sample(s.ids[: 4 + n % 7], s.counted[: 4 + n % 7]) for n, s in enumerate(samples)]
    ids = [torch.tensor([sample.ids]) for sample in texts]
    theirs = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    with Checkpoint(pair[0]) as base, Checkpoint(pair[1]) as tuned:
        model = SwappedModel(base, tuned)
        tuner = Tuner(model, {"some": texts})
        model.use(dict.fromkeys(model.names, "base"))
        weight = model.module.get_parameter("model.norm.weight")
        logs = [(theirs(i).logits[0, :-1], model.module(i).logits[0, :-1]) for i in ids]
        total = sum(
            (
                p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))
            ).sum()
            for p, q in logs
        )
        mean = total / sum(len(p) for p, _ in logs)
        (expected,) = torch.autograd.grad(mean, weight)
        for at_once in (1, 30, 1000):
            monkeypatch.setattr(auto_tune, "_INPUT_TOKENS", at_once)
            weight.grad = None
            assert tuner._descend(tuner._texts["some"], 2.0) == pytest.approx(
                float(mean.detach()), rel=1e-4
            )
            assert torch.allclose(weight.grad, 2 * expected, rtol=1e-3, atol=1e-5)


def oracle_kl(pair: Pair, base: Checkpoint, deltas: list, samples: list[Sample]) -> float:
    ours = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    merge_into(ours, base, deltas)
    ids = torch.tensor([sample.ids for sample in samples])
    with torch.no_grad():
        p = theirs(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        q = ours(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_auto_tunes_on_texts_of_the_users_and_keeps_what_is_no_worse(
    pair: Pair, own: Path, tmp_path: Path
) -> None:
    options = Options(codec="auto", ratio=6.0, calibration=own)
    summary = compress(*pair, tmp_path / "out", options)
    config = read_artifact(tmp_path / "out").config
    record = config.options["auto"]["tuned"]
    assert record["tokens"].keys() == {OWN, BUILT_IN}
    assert record["steps"] <= record["of"]
    after = {OWN: config.fidelity["kl_per_token"], BUILT_IN: config.fidelity[BUILT_IN]}
    after[BUILT_IN] = after[BUILT_IN]["kl_per_token"]
    for name, kl in after.items():
        assert kl <= record["kl_before"][name]
    assert (record["steps"] == 0) == (after == record["kl_before"])
    assert any("tuned norms and biases" in note for note in summary.notes)
    again = compress(*pair, tmp_path / "again", options)
    assert again.digest == summary.digest
    plain = compress(
        *pair, tmp_path / "plain", Options(codec="auto", ratio=6.0, calibration=own, tune=False)
    )
    for found in (summary, plain):
        assert found.ratio == pytest.approx(6, rel=0.03)
    assert "tuned" not in read_artifact(tmp_path / "plain").config.options["auto"]
    assert any("as asked" in note for note in plain.notes)


def test_auto_without_texts_does_not_tune_and_says_why(pair: Pair, tmp_path: Path) -> None:
    summary = compress(*pair, tmp_path / "out", Options(codec="auto", ratio=12.0))
    assert any("did not tune" in note and "--calibration" in note for note in summary.notes)
    assert "tuned" not in read_artifact(tmp_path / "out").config.options["auto"]


def test_auto_few_texts_of_the_users_are_all_measured_and_not_tuned_on(
    tiny_llama_ft: Path, tmp_path: Path
) -> None:
    file = tmp_path / "few.txt"
    file.write_text("one text\nanother text\na third\n")
    sets = calibration_sets(file, load_tokenizer(tiny_llama_ft))
    assert len(sets[OWN].measured) == 3
    assert sets[OWN].spare == []


def test_texts_measured_on_are_never_tuned_on(tiny_llama_ft: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("".join(f"text {n % 17} of them\n" for n in range(40)))  # many are twice there
    sets = calibration_sets(file, load_tokenizer(tiny_llama_ft))
    for found in sets.values():
        assert found.spare
        assert not set(found.measured) & set(found.spare)


def test_better_means_lower_in_the_mean_and_no_set_worse_than_before() -> None:
    def of(own: float, built_in: float) -> Measured:
        return Measured({OWN: own, BUILT_IN: built_in}, {})

    before = of(0.2, 0.2)
    assert is_better(of(0.1, 0.2), before, before)
    assert not is_better(of(0.01, 0.21), before, before)
    assert not is_better(of(0.21, 0.01), before, before)
    assert not is_better(of(0.2, 0.15), of(0.1, 0.2), before)
    assert not is_better(before, before, before)


def test_digest_tells_outcomes_apart(pair: Pair, tmp_path: Path) -> None:
    compress(*pair, tmp_path / "a", Options(ratio=8.0))
    compress(*pair, tmp_path / "b", Options(ratio=9.0))
    one, two = (
        {delta.name: delta for delta in read_artifact(tmp_path / name).tensors} for name in "ab"
    )
    assert digest(one) == digest(dict(reversed(one.items()))) != digest(two)


def test_line_says_what_was_kept() -> None:
    found = {name: Measured({OWN: kl}, {}) for name, kl in (("before", 0.2), ("after", 0.1))}
    better = Kept(Tuned(20, StagedDeltas(), 30), found["after"], {OWN: 900}, found["before"])
    assert "20 of 30 steps" in better.line()
    assert "0.2 to 0.1 on own texts" in better.line()
    assert (
        "kept none"
        in Kept(Tuned(0, StagedDeltas()), found["before"], {OWN: 9}, found["before"]).line()
    )
