"""Text assets from files: the base's directory, and what an artifact puts over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.artifact.files import GENERATION, TEMPLATE, TOKENIZER_FILES
from compressor.artifact.reader import OpenedArtifact
from compressor.errors import TooLarge
from server.errors import ConfigError
from server.text.assets import TextAssets, defaults_of, stop_ids
from server.text.description import Description, Undescribed
from server.text.store import TokenizerStore
from server.text.workers.tasks import load_fast_tokenizer

MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 64 << 20  # of all files of one tokenizer
# Given a tokenizer's folder; done by a text worker.
Describe = Callable[[Path], Description]


def load_base_text(base_dir: Path) -> TextAssets:
    """Read the base's text assets from its directory. Raises ConfigError."""
    try:
        tokenizer = load_fast_tokenizer(base_dir)
    except (ValueError, Undescribed) as error:
        raise ConfigError(f"the base's tokenizer cannot be used: {error}") from error
    generation = _read_json(base_dir, GENERATION)
    config = _read_json(base_dir, "config.json")
    return TextAssets.of_tokenizer(
        tokenizer,
        stop_ids(generation, config, tokenizer.eos_token_id),
        defaults_of(generation),
        base_dir,
    )


def load_variant_text(
    base_dir: Path,
    base: TextAssets,
    opened: OpenedArtifact,
    store: TokenizerStore,
    describe: Describe,
) -> TextAssets:
    """Overlay an artifact's own files (already verified, in memory) on the base's.

    Raises what `describe` raises, TooLarge, and whatever json makes of files that it cannot read.
    """
    aux, details = opened.aux, opened.config.finetuned_details
    dropped: list[str] = details.get("dropped_files", [])  # the fine-tune lives without them
    text = _with_tokenizer(base_dir, base, opened, dropped, store, describe)
    generation: dict[str, Any] = {}
    if GENERATION in aux:
        generation = json.loads(aux[GENERATION])
    elif GENERATION not in dropped:
        generation = _read_json(base_dir, GENERATION)
    config = _read_json(base_dir, "config.json") | details.get("config", {})
    own_eos = next(iter(text.eos_token_ids), None)  # so far the tokenizer's
    return replace(
        text,
        eos_token_ids=stop_ids(generation, config, own_eos),
        generation_defaults=defaults_of(generation),
    )


def _with_tokenizer(
    base_dir: Path,
    base: TextAssets,
    opened: OpenedArtifact,
    dropped: list[str],
    store: TokenizerStore,
    describe: Describe,
) -> TextAssets:
    """Vocabulary and template of the variant, with the tokenizer's own end of text."""
    aux = opened.aux
    own = [name for name in TOKENIZER_FILES if name in aux or name in dropped]
    if not own:
        return _sharing(base, None, "")
    if own == [TEMPLATE] and TEMPLATE in aux:
        return _sharing(base, _template(aux[TEMPLATE]), opened.digest)
    folder = store.put(_tokenizer_files(base_dir, aux, dropped))
    described = describe(folder)
    if described.likeness == base.likeness and described.template is not None:
        return _sharing(base, described.template, opened.digest)
    eos = described.eos_token_id
    return TextAssets(
        described.vocabulary,
        frozenset() if eos is None else frozenset([eos]),
        {},
        folder=folder,
        chars_per_token=described.chars_per_token,
        likeness=described.likeness,
        owner=opened.digest,
    )


def _sharing(base: TextAssets, template: str | None, owner: str) -> TextAssets:
    """The base's tokenizer with another template."""
    assert base.tokenizer is not None, "the base's is loaded"
    if template is not None and template == base.tokenizer.chat_template:
        template, owner = None, ""
    eos = base.tokenizer.eos_token_id
    ids = frozenset() if eos is None else frozenset([eos])
    return replace(base, eos_token_ids=ids, template=template, owner=owner)


def _template(content: bytes) -> str:
    if len(content) > MAX_TEMPLATE_BYTES:
        raise TooLarge(f"{TEMPLATE} is larger than {MAX_TEMPLATE_BYTES >> 20} MiB")
    return bytes(content).decode("utf-8")


def _tokenizer_files(
    base_dir: Path, aux: Mapping[str, bytes], dropped: list[str]
) -> dict[str, bytes]:
    """The variant's files, and the base's where it has none of its own."""
    files = {}
    for name in ("config.json", *TOKENIZER_FILES):
        if name in aux:
            files[name] = bytes(aux[name])
        elif name not in dropped and (base_dir / name).is_file():
            files[name] = (base_dir / name).read_bytes()
    if sum(map(len, files.values())) > MAX_TOKENIZER_BYTES:
        raise TooLarge(f"its tokenizer's files are larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
    return files


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content
