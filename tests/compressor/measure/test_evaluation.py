"""`impart eval` against Hugging Face models, loops over tokens and samples, and its own words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compressor.artifact.reader import Artifact, read_artifact
from compressor.checkpoint.files import Checkpoint
from compressor.cli.app import app
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import WrongShape
from compressor.export.reconstruct import reconstruct
from compressor.measure.evaluation import Evaluation, Evaluator, layer_of
from compressor.measure.samples import Sample, load_tokenizer, read_samples
from tests.tiny import CORPUS, make_tiny, perturb


def plain(ids: list[int]) -> Sample:
    return Sample(tuple(ids), (True,) * len(ids))


SAMPLES = [plain([5, 9, 33, 7, 80]), plain([12, 100, 101]), plain(list(range(20, 60)))]


@pytest.fixture(scope="module")
def delta(tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "delta"
    compress(tiny_llama, tiny_llama_ft, out, Options(ratio=10))
    return out


def evaluate(base: Path, tuned: Path, delta: Path, samples: list[Sample], **kw: Any) -> Evaluation:
    with Checkpoint(base) as ours, Checkpoint(tuned) as theirs:
        return Evaluator(ours, theirs, samples).evaluate(read_artifact(delta), **kw)


def logits(model: Any, sample: Sample) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.tensor([sample.ids])).logits[0, :-1].double()
    return found[torch.tensor(sample.counted[1:])]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def oracle(tuned: Any, ours: Any, samples: list[Sample]) -> dict[str, float]:
    """KL, its error, agreement, flips and perplexity, one token at a time in float64."""
    sums: dict[str, list[float]] = {"kl": [], "same": [], "flip": [], "loss": [], "n": []}
    for sample in samples:
        targets = [t for t, c in zip(sample.ids[1:], sample.counted[1:], strict=True) if c]
        kl = same = flip = loss = 0.0
        for p, q, target in zip(logits(tuned, sample), logits(ours, sample), targets, strict=True):
            log_p, log_q = p.log_softmax(0), q.log_softmax(0)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int(p.argmax()) == int(q.argmax())
            flip += (int(p.argmax()) == target) != (int(q.argmax()) == target)
            loss -= float(log_q[target])
        for key, value in zip(sums, (kl, same, flip, loss, len(targets)), strict=True):
            sums[key].append(value)
    total, n = sum(sums["n"]), len(samples)
    mean = sum(sums["kl"]) / total
    square = sum((k - mean * c) ** 2 for k, c in zip(sums["kl"], sums["n"], strict=True))
    return {
        "kl": mean,
        "kl_error": math.sqrt(square * n / (n - 1)) / total,
        "same": sum(sums["same"]) / total,
        "flip": sum(sums["flip"]) / total,
        "perplexity": math.exp(sum(sums["loss"]) / total),
    }


@pytest.mark.parametrize("kind", ["llama", "llama_vocab", "gpt2", "gemma", "qwen2"])
def test_evaluation_equals_a_loop_over_the_reconstructed_model(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = kind.removesuffix("_vocab")
    base = request.getfixturevalue(f"tiny_{name}")
    tuned = request.getfixturevalue(f"tiny_{name}_ft" + "_vocab" * kind.endswith("_vocab"))
    compress(base, tuned, tmp_path / "delta", Options(ratio=8))
    whole = reconstruct(base, tmp_path / "delta", tmp_path / "whole", dtype="float32")
    found = evaluate(base, tuned, tmp_path / "delta", SAMPLES)
    reference = load(tuned)
    for ours, expected in (
        (found.variant, oracle(reference, load(whole), SAMPLES)),
        (found.finetuned, oracle(reference, reference, SAMPLES)),
    ):
        assert ours.kl.mean == pytest.approx(expected["kl"], rel=1e-3, abs=1e-9)
        assert ours.kl.standard_error == pytest.approx(expected["kl_error"], rel=1e-3, abs=1e-9)
        assert ours.top1_agreement.mean == pytest.approx(expected["same"])
        assert ours.token_flips.mean == pytest.approx(expected["flip"])
        assert ours.perplexity == pytest.approx(expected["perplexity"], rel=1e-4)
    assert found.variant.kl.mean > 0
    assert found.n_tokens == sum(len(sample.ids) - 1 for sample in SAMPLES)
    assert found.variant.exact_match is None
    if not kind.endswith("_vocab"):
        expected = oracle(reference, load(base), SAMPLES)
        assert found.base.kl.mean == pytest.approx(expected["kl"], rel=1e-3)
        assert found.base.perplexity == pytest.approx(expected["perplexity"], rel=1e-4)


def test_changes_kept_counts_tokens_where_base_and_finetune_differ(
    tiny_llama: Path, tiny_llama_ft: Path, delta: Path, tmp_path: Path
) -> None:
    whole = reconstruct(tiny_llama, delta, tmp_path / "whole", dtype="float32")
    models = [load(path) for path in (tiny_llama, tiny_llama_ft, whole)]
    base, tuned, ours = (
        torch.cat([logits(model, sample).argmax(-1) for sample in SAMPLES]) for model in models
    )
    changed = base != tuned
    assert changed.any()
    found = evaluate(tiny_llama, tiny_llama_ft, delta, SAMPLES)
    assert found.changes_kept == pytest.approx(float((ours == tuned)[changed].double().mean()))


def test_layer_table_equals_models_with_only_that_layer_compressed(
    tiny_llama: Path, tiny_llama_ft: Path, delta: Path, tmp_path: Path
) -> None:
    whole = reconstruct(tiny_llama, delta, tmp_path / "whole", dtype="float32")
    found = evaluate(tiny_llama, tiny_llama_ft, delta, SAMPLES, layers=True, layer_samples=2)
    assert found.n_layer_texts == 2
    assert [part.name for part in found.layers] == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head",
    ]  # fmt: skip
    tuned_weights = load_file(tiny_llama_ft / "model.safetensors")
    ours = load_file(whole / "model.safetensors")
    reference = load(tiny_llama_ft)

    def kl(is_compressed: Callable[[str], bool]) -> float:
        mixed = {n: ours[n] if is_compressed(n) else tuned_weights[n] for n in ours}
        model = load(tiny_llama_ft)
        model.load_state_dict(mixed)
        return oracle(reference, model, SAMPLES[:2])["kl"]

    for part in found.layers:
        expected = kl(lambda name, part=part: layer_of(name) == part.name)  # type: ignore[misc]
        assert part.only.mean == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert part.all_but is None
    kinds = {part.name: part for part in found.kinds}
    assert set(kinds) == {"embeddings", "attention", "mlp", "norms and biases", "lm_head"}
    assert kinds["norms and biases"].only.mean == 0.0  # stored exactly
    assert kinds["mlp"].all_but is not None
    assert kinds["mlp"].only.mean == pytest.approx(kl(lambda n: ".mlp." in n), rel=1e-3)
    assert kinds["mlp"].all_but.mean == pytest.approx(kl(lambda n: ".mlp." not in n), rel=1e-3)
    coding = read_artifact(delta).config.coding
    assert coding is not None
    payload = sum(coding.raw_bytes.values())  # coded together: a layer has no coded bytes
    assert sum(part.n_bytes for part in found.layers) == payload
    assert sum(part.n_bytes for part in found.kinds) == payload


def test_several_deltas_share_one_reference_and_do_not_disturb_each_other(
    tiny_llama: Path, tiny_llama_ft: Path, delta: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft, tmp_path / "small", Options(ratio=20))
    artifacts: list[Artifact] = [read_artifact(delta), read_artifact(tmp_path / "small")]
    with Checkpoint(tiny_llama) as base, Checkpoint(tiny_llama_ft) as tuned:
        evaluator = Evaluator(base, tuned, SAMPLES)
        first, second, again = (
            evaluator.evaluate(artifacts[i], layers=i == 1, layer_samples=3) for i in (0, 1, 0)
        )
    assert first == again
    assert second.variant.kl.mean > first.variant.kl.mean


def test_exact_match_is_what_greedy_decoding_gives(
    tiny_llama: Path, tiny_llama_ft: Path, delta: Path
) -> None:
    model = load(tiny_llama_ft)
    samples = []
    for start in range(20, 60, 5):
        prompt = list(range(start, start + 4))
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=4)[0].tolist()
        if start % 2:
            out[-1] = (out[-1] + 1) % 300
        counted = (False,) * 4 + (True,) * (len(out) - 4)
        samples.append(Sample(tuple(out), counted, is_answer=True))
    found = evaluate(tiny_llama, tiny_llama_ft, delta, samples)
    assert found.finetuned.exact_match == 0.5
    assert found.finetuned.answer_flips == 0.0
    assert found.base.answer_flips is not None
    assert found.base.answer_flips > 0


def test_delta_of_another_finetunes_shape_raises(
    tiny_llama: Path, tiny_llama_ft: Path, tiny_llama_ft_vocab: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft_vocab, tmp_path / "delta", Options(ratio=8))
    with pytest.raises(WrongShape, match="another fine-tune"):
        evaluate(tiny_llama, tiny_llama_ft, tmp_path / "delta", SAMPLES)


def test_model_that_changes_its_logits_is_measured_with_that_change(tmp_path: Path) -> None:
    """Gemma 2 caps the logits after the output layer."""
    fields = {"num_hidden_layers": 1, "final_logit_softcapping": 3.0}
    base = make_tiny("gemma2", tmp_path / "base", seed=3, **fields)  # type: ignore[arg-type]
    tuned = perturb(base, tmp_path / "tuned")
    compress(base, tuned, tmp_path / "delta", Options(ratio=7))
    whole = reconstruct(base, tmp_path / "delta", tmp_path / "whole", dtype="float32")
    found = evaluate(base, tuned, tmp_path / "delta", SAMPLES)
    expected = oracle(load(tuned), load(whole), SAMPLES)
    assert found.variant.kl.mean == pytest.approx(expected["kl"], rel=1e-3)


def impart(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_prints_tables_and_json(
    tiny_llama: Path, tiny_llama_ft: Path, delta: Path, tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    records = [{"prompt": text[:20], "completion": text[20:]} for text in CORPUS]
    data.write_text("\n".join(map(json.dumps, records)))
    arguments = ("eval", tiny_llama, tiny_llama_ft, delta, "--data", data, "--layers")
    shown = impart(*arguments)
    assert (shown.exit_code, shown.stderr) == (0, "")
    for text in ("5 texts", "KL from the fine-tune", "answers word for word", "model.layers.1"):
        assert text in shown.stdout
    record = json.loads(impart(*arguments, "--json").stdout)
    assert record["data"] == "d.jsonl"
    assert record["variant"]["kl"]["mean"] > 0
    assert record["finetuned"]["top1_agreement"] == {"mean": 1.0, "standard_error": 0.0}
    assert [part["name"] for part in record["layers"]][1] == "model.layers.0"
    assert record["n_layer_texts"] == 5


def test_command_without_data_uses_the_built_in_texts(
    tiny_llama: Path, tiny_llama_ft: Path, delta: Path
) -> None:
    arguments = ("eval", tiny_llama, tiny_llama_ft, delta, "--max-texts", 3, "--max-tokens", 12)
    record = json.loads(impart(*arguments, "--json").stdout)
    assert (record["data"], record["n_texts"]) == ("built-in texts", 3)
    samples = read_samples(None, load_tokenizer(tiny_llama_ft), limit=3, max_tokens=12)
    expected = evaluate(tiny_llama, tiny_llama_ft, delta, samples)
    assert record["variant"]["kl"]["mean"] == pytest.approx(expected.variant.kl.mean, rel=1e-3)


def test_command_above_max_kl_exits_with_1_and_still_prints(
    tiny_llama: Path, tiny_llama_ft: Path, delta: Path
) -> None:
    arguments = ("eval", tiny_llama, tiny_llama_ft, delta, "--max-texts", 2, "--max-tokens", 9)
    assert impart(*arguments, "--max-kl", 1e9).exit_code == 0
    refused = impart(*arguments, "--max-kl", 0)
    assert refused.exit_code == 1
    assert "KL from the fine-tune" in refused.stdout
    assert "above --max-kl 0" in refused.stderr


def test_command_errors_are_one_line(
    tiny_llama: Path, tiny_llama_ft: Path, tiny_gpt2: Path, delta: Path, tmp_path: Path
) -> None:
    data = tmp_path / "d.txt"
    data.write_text("\n".join(CORPUS))
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    for base, tuned, file, message in (
        (tiny_llama, tiny_llama_ft, tmp_path / "none", "No such file"),
        (tiny_gpt2, tiny_llama_ft, data, "made for base"),
        (tiny_llama, adapter, data, "LoRA adapter"),
    ):
        done = impart("eval", base, tuned, delta, "--data", file)
        assert done.exit_code == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
