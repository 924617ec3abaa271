"""Text assets from files: generation defaults, and what an artifact may bring."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressor.errors import TooLarge
from server.errors import ConfigError
from server.text import loading
from server.text.description import Description
from server.text.loading import load_base_text, load_variant_text
from server.text.store import TokenizerStore


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


@dataclass
class Opened:
    """What is read of an opened artifact."""

    aux: dict[str, bytes]
    details: dict[str, Any] = field(default_factory=dict)
    digest: str = "d" * 64

    @property
    def config(self) -> Any:
        return SimpleNamespace(finetuned_details=self.details)


def refuse(folder: Path) -> Description:
    raise AssertionError("nobody else loads this tokenizer")


def test_variant_with_a_template_alone_shares_the_bases_tokenizer(tiny_llama: Path) -> None:
    base, store = load_base_text(tiny_llama), TokenizerStore()
    opened: Any = Opened({"chat_template.jinja": "é{{ 1 }}".encode()})
    text = load_variant_text(tiny_llama, base, opened, store, refuse)
    assert text.tokenizer is base.tokenizer
    assert (text.template, text.owner) == ("é{{ 1 }}", opened.digest)
    assert text.eos_token_ids == base.eos_token_ids


def test_variant_without_text_files_is_to_blame_for_nothing(tiny_llama: Path) -> None:
    base: Any = load_base_text(tiny_llama)
    opened: Any = Opened({})
    text = load_variant_text(tiny_llama, base, opened, TokenizerStore(), refuse)
    assert (text.template, text.owner, text.folder) == (None, "", base.folder)


def test_too_large_files_are_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAX_TEMPLATE_BYTES", 3)
    monkeypatch.setattr(loading, "MAX_TOKENIZER_BYTES", 3)
    base = load_base_text(tiny_llama)
    for name in ("chat_template.jinja", "tokenizer.json"):
        opened: Any = Opened({name: b"long"})
        with pytest.raises(TooLarge):
            load_variant_text(tiny_llama, base, opened, TokenizerStore(), refuse)
