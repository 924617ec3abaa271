"""Text assets: BOS, roles, generation defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from server.text.assets import TextAssets, load_base_text
from tests.tiny import BOS, make_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
MESSAGES = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]


def assets(template: str = TEMPLATE, *, bos: bool = True) -> TextAssets:
    return TextAssets.of_tokenizer(make_tokenizer(320, bos=bos, chat_template=template))


def test_bos_of_the_text_is_not_doubled() -> None:
    text = assets()
    bos = text.tokenizer.bos_token_id
    plain = text.encode("fox", add_special_tokens=False)
    assert text.encode("fox") == [bos, *plain]
    assert text.encode(f"{BOS}fox") == [bos, *plain]
    assert text.encode(f"{BOS}{BOS}fox") == [bos, bos, *plain]  # two were written
    assert text.encode(f"{BOS}fox", add_special_tokens=False) == [bos, *plain]
    assert text.encode(BOS) == [bos]
    assert assets(bos=False).encode(f"{BOS}fox") == [bos, *plain]


@pytest.mark.parametrize("own", ["", "{{ bos_token }}"])
def test_chat_has_one_bos_if_special_tokens_are_added(own: str) -> None:
    text = assets(own + TEMPLATE)
    options = {"add_generation_prompt": False, "continue_final_message": False}
    bos = text.tokenizer.bos_token_id
    plain = text.render_chat(MESSAGES, **options)
    assert plain.count(bos) == (1 if own else 0)
    added = text.render_chat(MESSAGES, **options, add_special_tokens=True)
    assert added == [bos, *(token for token in plain if token != bos)]


@pytest.mark.parametrize(
    ("template", "role"),
    [(TEMPLATE, "system"), ("{# knows developer #}" + TEMPLATE, "developer")],
)
def test_developer_is_the_system_where_the_template_does_not_know_it(
    template: str, role: str
) -> None:
    text = assets(template)
    ids = text.render_chat(MESSAGES, add_generation_prompt=False, continue_final_message=False)
    assert text.decode(ids) == f"[{role}] a[user] b"
    assert MESSAGES[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        (
            {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2},
            {"temperature": 0.0, "repetition_penalty": 1.2},
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 77},
            {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 77},
        ),
        ({"temperature": 0.6, "max_new_tokens": None}, {"temperature": 0.6}),
        ({}, {}),
    ],
)
def test_generation_config_gives_the_defaults(
    tiny_llama: Path, tmp_path: Path, generation: dict[str, Any], want: dict[str, Any]
) -> None:
    assert load_base_text(folder_with(tiny_llama, tmp_path, generation)).generation_defaults == want


@pytest.mark.parametrize("length", [0, -1, 2.5, "many", True])
def test_wrong_default_length_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, length: object
) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        load_base_text(folder_with(tiny_llama, tmp_path, {"max_new_tokens": length}))


def folder_with(base: Path, folder: Path, generation: dict[str, Any]) -> Path:
    """The base's text files with another generation_config.json."""
    for file in base.glob("*"):
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_token_texts_join_to_the_text_and_decode_leaves_out_a_character_that_only_begins() -> None:
    text = assets(bos=False)
    ids = text.encode("fox 🎉!")
    texts = text.token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "fox 🎉!"
    assert text.decode(ids[:-2], is_whole=False) == "fox "
    assert "\ufffd" in text.decode(ids[:-2])
    assert "".join(text.token_texts(ids[:-2])) == text.decode(ids[:-2])
