"""The quality measures against slow, obvious versions of themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evaluate import (
    Reference,
    Sample,
    Score,
    exact_match,
    generate,
    task_samples,
    text_samples,
)
from benchmarks.tasks import Item, load_items

ITEMS = [
    Item("Request: my card\nIntent:", " card arrival"),
    Item("Request: hello there, I would like a table\nIntent:", " none"),
    Item("Hi", " a much longer answer than the prompt"),
]


def load(path: Path) -> tuple[torch.nn.Module, object]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def test_distance_equals_unbatched_float64_loop(tiny_llama: Path, tiny_llama_ft: Path) -> None:
    base, tokenizer = load(tiny_llama)
    tuned, _ = load(tiny_llama_ft)
    samples = task_samples(tokenizer, ITEMS)
    kl: dict[bool, list[float]] = {True: [], False: []}
    agree = []
    for sample in samples:
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            p = torch.log_softmax(tuned(ids).logits[0].double(), -1)
            q = torch.log_softmax(base(ids).logits[0].double(), -1)
        for at in range(len(sample.ids) - 1):
            is_answer = at + 1 >= sample.n_prompt  # what is predicted here is in the answer
            kl[is_answer].append(float((p[at].exp() * (p[at] - q[at])).sum()))
            if is_answer:
                agree.append(int(p[at].argmax()) == int(q[at].argmax()))
    got = Reference(tuned, samples).distance(base)
    assert got.n_answer == len(kl[True])
    assert got.n_prompt == len(kl[False])
    assert got.kl_answer == pytest.approx(sum(kl[True]) / len(kl[True]), rel=1e-4)
    assert got.kl_prompt == pytest.approx(sum(kl[False]) / len(kl[False]), rel=1e-4)
    assert got.agreement == sum(agree) / len(agree)
    assert got.kl_answer > 0.01


def test_distance_of_the_finetune_to_itself_is_zero(tiny_llama_ft: Path) -> None:
    model, tokenizer = load(tiny_llama_ft)
    samples = text_samples(tokenizer, ["some text of no importance", "x", "more"], max_tokens=8)
    assert max(len(sample.ids) for sample in samples) == 8
    got = Reference(model, samples).distance(model)
    assert got.kl_answer == pytest.approx(0, abs=1e-6)
    assert math.isnan(got.kl_prompt)
    assert got.agreement == 1


def alone(model: torch.nn.Module, prompt: list[int], n: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_generate_in_padded_batch_equals_one_by_one(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    prompts = [tokenizer(item.prompt).input_ids for item in ITEMS]
    expected = [
        tokenizer.decode(alone(model, prompt, 10), skip_special_tokens=True) for prompt in prompts
    ]
    assert generate(model, tokenizer, prompts, 10) == expected
    assert len(set(expected)) == 3


def test_exact_match_counts_answers_that_end_where_the_gold_does(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    first, *others = ITEMS
    ids = alone(model, tokenizer(first.prompt).input_ids, 4)
    gold = tokenizer.decode(ids[:3])
    wrong = [Item(item.prompt, "nothing like it") for item in others]
    right = Item(first.prompt, gold)
    assert exact_match(model, tokenizer, [right, *wrong]) == Score(0, 3)  # it goes on after gold
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[3])
    assert exact_match(model, tokenizer, [right, *wrong]) == Score(1 / 3, 3)


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
        Reference(model, [Sample((1, 5, 9, 17), 2)])


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
