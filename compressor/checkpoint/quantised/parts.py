"""The stored tensors of a quantised checkpoint, asked for by what they must be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from compressor.checkpoint.headers import StoredTensor, TensorIndex
from compressor.errors import CheckpointError

FLOATS = ("F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SMALL_BYTES = 1 << 16


class Parts:
    """Gives out stored tensors and remembers which: what is left over is the dense model's.

    owner  names the checkpoint in messages
    """

    def __init__(self, stored: TensorIndex, owner: str) -> None:
        self.stored = stored
        self.taken: set[str] = set()
        self._owner = owner

    def ending(self, suffix: str) -> Iterable[str]:
        """Beginnings of the names that end so, in the order of the files."""
        return [name.removesuffix(suffix) for name in self.stored if name.endswith(suffix)]

    def take(
        self, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None
    ) -> StoredTensor:
        """Return a tensor that must be there. Raises CheckpointError if it is not, or another."""
        tensor = self.take_if_there(name, dtypes, shape)
        if tensor is None:
            raise CheckpointError(
                f"{self._owner}: tensor {name} is missing, which quantised weights need; download "
                "the model again"
            )
        return tensor

    def take_if_there(
        self, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None
    ) -> StoredTensor | None:
        """As `take`, of a tensor that need not be there."""
        tensor = self.stored.get(name)
        if tensor is None:
            return None
        if tensor.dtype not in dtypes:
            raise self.wrong(name, f"is stored as {tensor.dtype} instead of {' or '.join(dtypes)}")
        if shape is not None and tensor.shape != shape:
            raise self.wrong(name, f"has shape {list(tensor.shape)} instead of {list(shape)}")
        self.taken.add(name)
        return tensor

    def drop(self, *suffixes: str) -> None:
        """Leave out what only kernels of quantised activations or caches need."""
        self.taken |= {name for name in self.stored if name.endswith(suffixes)}

    def text(self, name: str) -> bytes:
        """The bytes of a small tensor."""
        tensor = self.stored[name]
        if tensor.n_bytes > _SMALL_BYTES:
            raise self.wrong(name, f"takes {tensor.n_bytes} bytes, more than such a tensor has")
        with tensor.file.open("rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), tensor.n_bytes, tensor.offset)
        if len(data) != tensor.n_bytes:
            raise CheckpointError(f"{tensor.file} became shorter while it was read")
        return data

    def wrong(self, name: str, what: str) -> CheckpointError:
        """The error of a tensor that does not fit."""
        return CheckpointError(
            f"{self._owner}: tensor {name} {what}, which its quantised weights do not allow; "
            "download the model again, or give the 16- or 32-bit weights"
        )

    def matrix(self, name: str, dtypes: Iterable[str]) -> tuple[int, int]:
        """Take a 2-D tensor and return its shape."""
        shape = self.take(name, dtypes).shape
        if len(shape) != 2 or not math.prod(shape):
            raise self.wrong(name, f"has shape {list(shape)} instead of a matrix's")
        return shape[0], shape[1]


def blocks_of(size: int, block: int) -> int:
    """How many blocks hold `size` elements, the last of them maybe not full."""
    return -(-size // block)
