"""Texts, prompts and chats as samples: which tokens count, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from compressor.errors import CheckpointError, InputError
from compressor.measure.samples import load_tokenizer, read_samples
from tests.tiny import CORPUS, EOS


def test_prompts_and_completions_measure_the_completion_only(
    tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_llama_ft)
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": "Say it:", "completion": " yes"}) + "\n")
    (sample,) = read_samples(file, tokenizer)
    prompt = tokenizer("Say it:").input_ids
    answer = [*tokenizer(" yes", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert list(sample.ids) == prompt + answer
    assert list(sample.counted) == [False] * len(prompt) + [True] * len(answer)
    assert sample.is_answer
    file.write_text(json.dumps({"prompt": "Say it:", "completion": f" yes{EOS}"}) + "\n")
    assert read_samples(file, tokenizer) == [sample]  # no second end of text


def test_parquet_rows_give_the_samples_of_the_same_json_lines(
    tiny_llama_ft: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    tokenizer = load_tokenizer(tiny_llama_ft)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for records in (
        [{"prompt": f"Say {i}:", "completion": f" {i}", "id": i} for i in range(4)],
        [{"messages": chat}, {"messages": chat * 2}],
        [{"prompt": chat[:1], "completion": chat[1:]}],
        [{"text": "some text"}, {"text": "more"}],
    ):
        lines, table = tmp_path / "d.jsonl", tmp_path / "d.parquet"
        lines.write_text("\n".join(map(json.dumps, records)))
        parquet.write_table(pa.Table.from_pylist(records), table)
        for limit in (1, 9):
            expected = read_samples(lines, tokenizer, limit=limit)
            assert read_samples(table, tokenizer, limit=limit) == expected
    parquet.write_table(pa.table({"prompt": ["x"], "answer": ["y"]}), table)
    with pytest.raises(InputError, match='no column "completion", only prompt, answer'):
        read_samples(table, tokenizer)
    parquet.write_table(pa.table({"prompt": ["x"], "completion": [None]}), table)
    with pytest.raises(InputError, match="row 1"):
        read_samples(table, tokenizer)


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_chat_measures_the_assistants_turns_in_the_finetunes_template(
    tiny_llama_ft: Path, tmp_path: Path, form: str
) -> None:
    tokenizer = load_tokenizer(tiny_llama_ft)
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "No"},
    ]
    record = (
        {"messages": chat} if form == "messages" else {"prompt": chat[:3], "completion": chat[3:]}
    )
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (sample,) = read_samples(file, tokenizer)
    whole = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
    assert tokenizer.decode(sample.ids) == whole
    measured = tokenizer.decode([i for i, c in zip(sample.ids, sample.counted, strict=True) if c])
    assert measured == "Good day<|im_end|>No<|im_end|>"[-12 if form == "prompt" else 0 :]


def test_samples_are_cut_limited_and_empty_ones_left_out(
    tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_llama_ft)
    file = tmp_path / "d.jsonl"
    records = [{"prompt": "a" * 200, "completion": "b"}, {"prompt": "a", "completion": "b" * 50}]
    file.write_text("\n".join(map(json.dumps, records * 3)))
    (sample,) = read_samples(file, tokenizer, limit=3, max_tokens=16)
    assert len(sample.ids) == 16
    texts = tmp_path / "t.txt"
    texts.write_text("\n".join(CORPUS))
    assert len(read_samples(texts, tokenizer, limit=2)) == 2
    with pytest.raises(InputError, match="allow more tokens"):
        read_samples(file, tokenizer, limit=1, max_tokens=16)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "x"}, 'line 1: "messages" must be a list'),
        ({"messages": [{"role": "user"}]}, "line 1"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"prompt": "x"}, "must be two texts"),
        ({"prompt": "x", "completion": 3}, "must be two texts"),
        ({"prompt": ["x"], "completion": [3]}, '"prompt" must be a list of objects'),
    ],
)
def test_unusable_chat_line_raises_naming_the_line(
    tiny_llama_ft: Path, tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        read_samples(file, load_tokenizer(tiny_llama_ft))


def test_template_that_refuses_or_rewrites_and_no_template_raise(
    tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_llama_ft)
    file = tmp_path / "d.jsonl"
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    file.write_text(json.dumps({"messages": turn * 2}))
    for template, message in (
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages | length }}{{ messages[-1].content }}", "message 2 differently"),
        (None, "no chat template"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=message):
            read_samples(file, tokenizer)


def test_samples_need_a_tokenizer(tiny_llama_ft: Path, tmp_path: Path) -> None:
    assert AutoTokenizer.from_pretrained(tiny_llama_ft).eos_token == EOS
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)
