"""The identity of a base model: what a delta was made for.

A hash over every tensor's name, dtype, shape and sampled bytes, and over the configuration. It is
the same for one file or many shards, does not read the whole checkpoint (at most 64 KiB a
tensor), and changes with any retraining or conversion: those touch all bytes, not a few.

Of a checkpoint that is stored quantised, the tensors and the configuration are those in the files:
the quantised bytes and how they were made, besides the dtype that they are dequantised to and the
number of our rules for that.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import StoredTensor
from compressor.errors import CheckpointError

_CHUNK_BYTES = 4096
_N_CHUNKS = 16
_WHOLE_BYTES = _CHUNK_BYTES * _N_CHUNKS  # tensors up to this are hashed entirely
# Keys that differ between copies of one model: where it came from and who wrote the file.
_OF_ONE_COPY = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
    }
)


def base_identity(model_dir: str | Path) -> str:
    """Return the identity of a safetensors checkpoint directory: 64 lower-case hex digits.

    Raises CheckpointError if it is not one (pickle checkpoints are refused, with the command
    that converts them).
    """
    with Checkpoint(model_dir) as checkpoint:
        return identity_of(checkpoint)


def identity_of(checkpoint: Checkpoint) -> str:
    """Return the identity of an open checkpoint."""
    digest = hashlib.sha256(b"impart-base 1\n")
    config = _stable(checkpoint.stored_config)
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    digest.update(canonical.encode() + b"\n")
    if checkpoint.quantisation is not None:
        digest.update(f"dequantised 1\t{checkpoint.quantisation.dtype}\n".encode())
    for name in sorted(checkpoint.stored):
        stored = checkpoint.stored[name]
        shape = ",".join(map(str, stored.shape))
        digest.update(f"{name}\t{stored.dtype}\t{shape}\t{_sample(stored)}\n".encode())
    return digest.hexdigest()


def _stable(value: Any) -> Any:
    """The configuration without its volatile keys, at any depth."""
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _OF_ONE_COPY}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return value


def _sample(stored: StoredTensor) -> str:
    """Hash of the tensor's bytes: all of a small one, evenly spaced chunks of a large one."""
    size = stored.n_bytes
    if size <= _WHOLE_BYTES:
        ranges = [(0, size)]
    else:
        last = size - _CHUNK_BYTES
        ranges = [(i * last // (_N_CHUNKS - 1), _CHUNK_BYTES) for i in range(_N_CHUNKS)]
    digest = hashlib.sha256()
    with stored.file.open("rb", buffering=0) as stream:
        for start, length in ranges:
            chunk = os.pread(stream.fileno(), length, stored.offset + start)
            if len(chunk) != length:
                raise CheckpointError(
                    f"{stored.file} became shorter while it was read; run again once it is whole"
                )
            digest.update(chunk)
    return digest.hexdigest()
