"""Tokenizer, chat template, generation defaults and stop tokens of the base or one variant.

All of them come from files an operator installed (base directory, verified artifact), never from a
request. Templates are rendered by transformers in its sandbox.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.artifact.files import TOKENIZER_FILES
from compressor.artifact.reader import OpenedArtifact
from server.errors import ConfigError, InvalidRequest

GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class TextAssets:
    """Everything between text and token ids for one variant."""

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    generation_defaults: dict[str, Any]

    @property
    def backend(self) -> Tokenizer:
        """The `tokenizers` object that incremental decoding works on."""
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        return backend

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens this tokenizer adds by default."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text (partial UTF-8 shows as the replacement character)."""
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> list[int]:
        """Render the chat template and tokenise. Raises InvalidRequest if either cannot be."""
        if not self.tokenizer.chat_template:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except Exception as error:  # a template may raise anything, jinja2's own errors included
            raise InvalidRequest(
                f"the chat template refused these messages: {_first_line(error)}", param="messages"
            ) from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def load_base_text(base_dir: Path) -> TextAssets:
    """Read the base's text assets from its directory."""
    return _assets(
        _load_tokenizer(base_dir),
        _read_json(base_dir, "generation_config.json"),
        _read_json(base_dir, "config.json"),
    )


def load_variant_text(base_dir: Path, base: TextAssets, opened: OpenedArtifact) -> TextAssets:
    """Overlay an artifact's own files (already verified, in memory) on the base's.

    Raises whatever transformers and tokenizers make of files they cannot use.
    """
    aux, details = opened.aux, opened.config.finetuned_details
    dropped: list[str] = details.get("dropped_files", [])  # the fine-tune lives without them
    tokenizer = base.tokenizer
    if any(name in aux or name in dropped for name in TOKENIZER_FILES):
        with tempfile.TemporaryDirectory(prefix="impart-tokenizer-") as folder:
            for name in ("config.json", *TOKENIZER_FILES):
                if name in aux:
                    Path(folder, name).write_bytes(aux[name])
                elif name not in dropped and (base_dir / name).is_file():
                    shutil.copyfile(base_dir / name, Path(folder, name))
            tokenizer = _load_tokenizer(Path(folder))
    generation: dict[str, Any] = {}
    if "generation_config.json" in aux:
        generation = json.loads(aux["generation_config.json"])
    elif "generation_config.json" not in dropped:
        generation = _read_json(base_dir, "generation_config.json")
    config = _read_json(base_dir, "config.json") | details.get("config", {})
    return _assets(tokenizer, generation, config)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.is_fast:
        raise ConfigError("this server takes only fast tokenizers, which have a tokenizer.json")
    return tokenizer


def _assets(
    tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any], config: dict[str, Any]
) -> TextAssets:
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        eos = tokenizer.eos_token_id
    ids = frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])
    defaults = {
        name: generation[name]
        for name in GENERATION_DEFAULTS
        if generation.get(name) is not None and generation.get("do_sample", True)
    }
    return TextAssets(tokenizer, ids, defaults)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
