"""The quality measures against slow, obvious versions of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evaluate import (
    Reference,
    Score,
    common_prefix,
    hidden_states,
    prefix_cache,
    task_samples,
    text_samples,
)
from benchmarks.tasks import Item, load_items, reference_paragraphs
from compressor.measure.samples import Sample

ITEMS = [
    Item("Request: my card\nIntent:", " card arrival"),
    Item("Request: hello there, I would like a table\nIntent:", " none"),
    Item("Hi", " a much longer answer than the prompt"),
]


def sample_of(ids: tuple[int, ...], n_prompt: int) -> Sample:
    return Sample(ids, (False,) * n_prompt + (True,) * (len(ids) - n_prompt), True)


def load(path: Path) -> tuple[torch.nn.Module, object]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def alone(model: torch.nn.Module, prompt: list[int], n: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_equals_unbatched_float64_loop(
    tiny_llama: Path, tiny_llama_ft: Path, dtype: torch.dtype
) -> None:
    base, tokenizer = load(tiny_llama)
    tuned, _ = load(tiny_llama_ft)
    samples = task_samples(tokenizer, ITEMS)
    kl, agree = [], []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            p = torch.log_softmax(tuned(ids).logits[0].double(), -1)
            q = torch.log_softmax(base(ids).logits[0].double(), -1)
        for at in range(sample.counted.index(True) - 1, len(sample.ids) - 1):
            kl.append(float((p[at].exp() * (p[at] - q[at])).sum()))
            agree.append(int(p[at].argmax()) == int(q[at].argmax()))
    reference = Reference(tuned, samples)
    got = reference.distance(base.to(dtype))
    exact = dtype == torch.float32
    assert reference.n_tokens == len(kl)
    assert got.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4 if exact else 0.05)
    assert got.agreement == pytest.approx(sum(agree) / len(agree), abs=1e-9 if exact else 0.1)
    assert got.kl > 0.01


def test_distance_of_the_finetune_to_itself_is_zero(tiny_llama_ft: Path) -> None:
    model, tokenizer = load(tiny_llama_ft)
    samples = text_samples(tokenizer, ["some text of no importance", "x", "more"], max_tokens=8)
    assert max(len(sample.ids) for sample in samples) == 8
    reference = Reference(model, samples)
    got = reference.distance(model)
    assert got.kl == pytest.approx(0, abs=1e-6)
    assert got.agreement == 1
    assert got.correct == reference.correct


def test_correct_is_what_greedy_generation_gives(tiny_llama: Path) -> None:
    """An answer that stops where the gold one does, goes on after it, and is another."""
    model, tokenizer = load(tiny_llama)
    prompts = [tokenizer(item.prompt).input_ids for item in ITEMS]
    samples = []
    for prompt in prompts:
        ids = alone(model, prompt, 4)
        samples += [
            sample_of((*prompt, *ids), len(prompt)),
            sample_of((*prompt, *ids[:3], ids[3] ^ 1), len(prompt)),
            sample_of((*prompt, ids[0] ^ 1, *ids[1:]), len(prompt)),
        ]
    reference = Reference(model, samples)
    assert reference.correct == (True, False, False) * 3
    assert reference.distance(model).correct == reference.correct


def test_shared_prefix_is_run_once_and_changes_nothing(tiny_qwen2: Path) -> None:
    model, tokenizer = load(tiny_qwen2)
    samples = task_samples(tokenizer, ITEMS[:2])
    prefix = common_prefix(samples)
    assert len(prefix) > 1
    assert all(sample.ids[: len(prefix)] == prefix for sample in samples)
    cache = prefix_cache(model, prefix)
    for _ in range(2):  # the cache can be used again
        torch.testing.assert_close(
            hidden_states(model, samples, len(prefix), cache),
            hidden_states(model, samples, 0, None),
        )


def test_common_prefix_leaves_a_token_of_every_prompt() -> None:
    samples = [sample_of((1, 2, 3, 4), 3), sample_of((1, 2, 3, 5), 2)]
    assert common_prefix(samples) == (1,)
    assert common_prefix([sample_of((1, 2, 3), 2), sample_of((4, 2, 3), 2)]) == ()
    assert common_prefix([sample_of((1, 2, 3, 4), 3)]) == (1, 2)


def test_reference_of_a_model_that_caps_its_logits_is_refused(tiny_llama: Path) -> None:
    model, _ = load(tiny_llama)
    plain = type(model).forward

    class Capped(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = plain(self, *args, **kwargs)
            out.logits = 5 * torch.tanh(out.logits / 5)
            return out

    model.__class__ = Capped
    with pytest.raises(ValueError, match="after lm_head"):
        Reference(model, [sample_of((1, 5, 9, 17), 2)])


def test_score_standard_error() -> None:
    assert Score(0.9, 400).standard_error == pytest.approx(0.015)


def test_load_items_formats(tmp_path: Path) -> None:
    banking = tmp_path / "test.csv"
    banking.write_text('text,category\n"Where, now?",card_arrival\n')
    assert load_items("intent", banking, None) == [
        Item("Classify the banking request.\nRequest: Where, now?\nIntent:", " card arrival")
    ]
    labels = [
        {"slot": "time", "valueSpan": {"startIndex": 10, "endIndex": 14}},
        {"slot": "people", "valueSpan": {"endIndex": 4}},
    ]
    restaurant = tmp_path / "test.json"
    restaurant.write_text(json.dumps([{"userInput": {"text": "four at   7 pm"}, "labels": labels}]))
    (item,) = load_items("slots", restaurant, 5)
    assert item.prompt.endswith("Message: four at   7 pm\nSlots:")
    assert item.answer == ' {"people": "four", "time": "7 pm"}'


def test_load_items_same_seed_same_draw(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("text,category\n" + "".join(f"t{i},c_{i}\n" for i in range(50)))
    assert load_items("intent", path, 10) == load_items("intent", path, 10)
    assert load_items("intent", path, 10) != load_items("intent", path, 10, seed=1)
    assert len(set(load_items("intent", path, 10))) == 10


def test_reference_paragraphs_are_prose_and_the_same_every_time() -> None:
    drawn = reference_paragraphs(20)
    assert drawn == reference_paragraphs(20)
    assert len(set(drawn)) == 20
    assert all(len(text) > 200 and "\n" not in text and text[-1] == "." for text in drawn)
