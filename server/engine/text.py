"""Tokenizer, chat template, generation defaults and stop tokens of the base or one variant.

All of them come from files an operator installed (base directory, verified artifact), never from a
request. Templates are rendered by transformers in its sandbox.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor.artifact.files import TOKENIZER_FILES
from compressor.artifact.reader import OpenedArtifact
from server.engine.text_stream import text_stream
from server.engine.vocabulary import Vocabulary
from server.errors import ConfigError, InvalidRequest

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p")
GENERATION_DEFAULTS = (*SAMPLING_DEFAULTS, "repetition_penalty", "max_new_tokens")
DEVELOPER = "developer"


@dataclass(frozen=True, slots=True)
class TextAssets:
    """Everything between text and token ids for one variant."""

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    generation_defaults: dict[str, Any]
    vocabulary: Vocabulary = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", Vocabulary(self.backend))

    @property
    def backend(self) -> Tokenizer:
        """The `tokenizers` object that incremental decoding works on."""
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        return backend

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that this tokenizer adds (if they are wanted). A text
        that begins with the BOS token itself gets no second one.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        bos = self.tokenizer.bos_token
        if add_special_tokens and bos and text.startswith(bos):
            own = self.tokenizer.encode(text, add_special_tokens=False)
            if ids[1 : 1 + len(own)] == own and ids[0] == own[0]:
                del ids[0]
        return ids

    def decode(self, token_ids: Sequence[int], *, is_whole: bool = True) -> str:
        """All of the ids as text, special tokens included.

        is_whole  False: leave out a character at the end that the ids only begin
        """
        if is_whole:
            return self.vocabulary.decode(list(token_ids))
        stream = text_stream(self.vocabulary, skip_special_tokens=False)
        pieces = [piece for token_id in token_ids for piece in stream.push(token_id)]
        return "".join(pieces + stream.flush(at_end=False))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each id adds to the text: "" for a part of a character that a later completes."""
        stream = text_stream(self.vocabulary, skip_special_tokens=False)
        pieces = [piece for token_id in token_ids for piece in stream.push(token_id)]
        return (pieces + stream.flush())[: len(token_ids)]

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Render the chat template and tokenise. Raises InvalidRequest if either cannot be.

        add_special_tokens  whether the tokenizer's own are added to those of the template
        """
        if not self.tokenizer.chat_template:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                self._known_roles(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except Exception as error:  # a template may raise anything, jinja2's own errors included
            raise InvalidRequest(
                f"the chat template refused these messages: {_first_line(error)}", param="messages"
            ) from error
        return self.encode(text, add_special_tokens=add_special_tokens)

    def _known_roles(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with `developer`, the newer name, as `system` where the template does
        not know it.
        """
        if DEVELOPER in str(self.tokenizer.chat_template):
            return messages
        return [
            message | {"role": "system"} if message["role"] == DEVELOPER else message
            for message in messages
        ]


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
    return TextAssets(tokenizer, ids, _generation_defaults(generation))


def _generation_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """What a request gets that says nothing else. `do_sample: false` is greedy: temperature 0, the
    filters of a draw left out, penalties as they are. Raises ConfigError.
    """
    given = {
        name: generation[name] for name in GENERATION_DEFAULTS if generation.get(name) is not None
    }
    if generation.get("do_sample") is False:
        given = {name: given[name] for name in given.keys() - {*SAMPLING_DEFAULTS}}
        given["temperature"] = 0.0
    length = given.get("max_new_tokens")
    if length is not None and (type(length) is not int or length < 1):
        raise ConfigError(
            "max_new_tokens of generation_config.json must be a whole number from 1 on; correct it"
        )
    return given


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
