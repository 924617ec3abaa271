"""What the settings name on disk, looked at before torch is imported: mistakes come first.

The base is found (or fetched from the Hub), its files and the deltas' folder can be read, and its
weights are whole. Only what needs the model itself is left to the engine.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from compressor.checkpoint.folder import read_model_config, resolve, weight_files
from compressor.checkpoint.hub import cached_ref, parse_ref, with_revision
from compressor.checkpoint.quantised.index import dense_tensors
from compressor.checkpoint.quantised.settings import quantisation_of
from compressor.errors import ImpartError
from compressor.readable import why_unreadable
from compressor.usable_memory import usable_memory_bytes
from server.errors import ConfigError
from server.settings import Settings, check_kv_cache, check_max_model_len

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What the headers of a model's weight files say.

    dtype         most elements' number format
    n_bytes       of the files
    quantisation  how the weights are stored quantised, or None
    """

    n_parameters: int
    dtype: str
    n_bytes: int
    quantisation: str | None = None

    @property
    def number_format(self) -> str:
        if self.quantisation is None:
            return self.dtype
        return f"{self.dtype} (stored as {self.quantisation}, dequantised once)"


def located(settings: Settings) -> Settings:
    """The settings with the base as a local directory and under its name, and everything checked
    that needs no model; says what was found. A Hub id is fetched, unless the cache holds it.

    Raises ConfigError. Its message is for the operator and names paths.
    """
    if settings.device == "cpu" or (settings.device == "auto" and not may_have_gpu()):
        check_kv_cache(settings, usable_memory_bytes())
    try:
        wanted = with_revision(str(settings.base), settings.base_revision, "--base-revision")
        if parse_ref(wanted) is not None and not os.path.lexists(wanted):
            _announce_fetch(wanted)
        folder = resolve(wanted)
        n_positions = _n_positions(read_model_config(folder))
        stored = stored_model(folder)
    except ImpartError as error:
        raise ConfigError(f"the base: {error}") from error
    if n_positions is not None:
        check_max_model_len(settings, n_positions)
    if settings.deltas is not None:
        _check_folder(settings.deltas)
    ref = cached_ref(folder)
    name = settings.served_base_name or (ref.repo if ref else folder.resolve().name)
    log.info(
        "the base %s has %s parameters in %s, %s on disk (%s)",
        name,
        _count(stored.n_parameters),
        stored.number_format,
        f"{_count(stored.n_bytes)} bytes",
        folder,
    )
    return replace(settings, base=folder, base_revision=None, served_base_name=name)


def stored_model(folder: Path) -> StoredModel:
    """Read the headers of all weight files. Raises CheckpointError if one is not whole."""
    elements: Counter[str] = Counter()
    for tensor in dense_tensors(folder).values():
        elements[tensor.dtype] += prod(tensor.shape)
    dtype = max(elements, key=lambda name: elements[name], default="")
    n_bytes = sum(file.stat().st_size for file in weight_files(folder))
    quantisation = quantisation_of(read_model_config(folder))
    stored_as = quantisation.text if quantisation else None
    return StoredModel(elements.total(), DTYPES.get(dtype, dtype), n_bytes, stored_as)


def _announce_fetch(ref: str) -> None:
    from huggingface_hub.utils import disable_progress_bars

    log.info("the server takes %s from the Hub's cache, or fetches it into that", ref)
    if not sys.stderr.isatty():
        disable_progress_bars()


def _n_positions(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that config.json speaks of, under one of its two usual names."""
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        for key in ("max_position_embeddings", "n_positions"):
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def may_have_gpu() -> bool:
    """False where torch cannot find one: the driver that it would ask is not there."""
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()  # ROCm's, which torch calls cuda as well
    return True


def _check_folder(deltas: Path) -> None:
    problem = why_unreadable(deltas)
    if problem is not None:
        raise ConfigError(f"the deltas: {problem}")
    if not deltas.is_dir():
        raise ConfigError(
            f"the deltas: {deltas} is a file; give the folder that holds delta artifacts"
        )


def _count(number: int) -> str:
    """134.5 million, 8.03 billion."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.4g} {word}"
    return f"{number:,}"
