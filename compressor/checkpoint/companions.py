"""Files beside the weights that belong to a fine-tune: tokenizer, chat template, generation config.

Only those that differ from the base's go into an artifact; JSON is compared by what it says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from compressor.errors import CheckpointError

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
COMPANIONS = tuple(sorted((*TOKENIZER_FILES, "generation_config.json")))
_NOISE = ("transformers_version", "_from_model_config", "_commit_hash", "name_or_path")
_HAS_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def changed_companions(base: Path, tuned: Path) -> dict[str, bytes]:
    """Return the fine-tune's companion files that differ from the base's, by name."""
    changed = {}
    for name in COMPANIONS:
        theirs = _read(tuned / name)
        if theirs is None:
            continue
        ours = _read(base / name)
        if ours is None or not _says_the_same(name, ours, theirs):
            changed[name] = theirs
    return changed


def dropped_companions(base: Path, tuned: Path) -> list[str]:
    """Return companion files the base has and a fine-tune with its own tokenizer has not.

    A fine-tune without any tokenizer uses the base's, all of it.
    """
    if not any((tuned / name).is_file() for name in _HAS_TOKENIZER):
        return []
    return [n for n in COMPANIONS if (base / n).is_file() and not (tuned / n).is_file()]


def copy_companions(base: Path, out: Path, changed: dict[str, bytes], dropped: list[str]) -> None:
    """Write the fine-tune's companion files to `out`."""
    for name in COMPANIONS:
        if name in changed:
            (out / name).write_bytes(changed[name])
        elif name not in dropped and (base / name).is_file():
            shutil.copyfile(base / name, out / name)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _says_the_same(name: str, ours: bytes, theirs: bytes) -> bool:
    if ours == theirs:
        return True
    if not name.endswith(".json"):
        return False
    try:
        first, second = json.loads(ours), json.loads(theirs)
    except ValueError:
        return False
    if isinstance(first, dict) and isinstance(second, dict):
        for key in _NOISE:
            first.pop(key, None)
            second.pop(key, None)
    return bool(first == second)
