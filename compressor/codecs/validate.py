"""Checks shared by every term's `from_parts`: what a hostile or damaged artifact may hold."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.codecs.term import Params, Shape
from compressor.errors import Corrupt, NonFinite, UnsupportedVersion, WrongShape

_MAX_DIM = 1 << 31
_MAX_NUMBER = 1e300
_MAX_UNIT = 2.0**100  # times float16's largest still fits float32


def check_shape(codec: str, shape: Shape) -> None:
    """A term's matrix has two dimensions, both at least one."""
    if len(shape) != 2 or not all(0 < size < _MAX_DIM for size in shape):
        raise WrongShape(f"{codec}: a term needs a matrix shape, found {list(shape)}")


def check_names(codec: str, tensors: dict[str, Tensor], expected: set[str]) -> None:
    """Exactly the expected parts are there."""
    if set(tensors) != expected:
        raise Corrupt(f"{codec}: expected parts {sorted(expected)}, found {sorted(tensors)}")


def check_part(
    codec: str, tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """Return part `name` after checking dtype, shape and, for floats, that all is finite."""
    part = tensors[name]
    if part.dtype != dtype or tuple(part.shape) != shape:
        raise WrongShape(
            f"{codec}: part {name} should be {dtype} {list(shape)}, "
            f"found {part.dtype} {list(part.shape)}"
        )
    if part.dtype.is_floating_point and not is_finite(part):
        raise NonFinite(f"{codec}: part {name} holds NaN or infinity")
    return part


def is_finite(part: Tensor) -> bool:
    """Whether no element of a float tensor (of at least one) is NaN or infinite.

    By its largest magnitude: several times faster than looking at every element by itself.
    """
    return bool(part.abs().amax() <= torch.finfo(part.dtype).max)  # false for NaN too


def int_param(codec: str, params: Params, key: str, low: int, high: int) -> int:
    """Return the whole number `key`, within ``low..high``."""
    value = params.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Corrupt(f"{codec}: parameter {key} should be a whole number, found {value!r:.40}")
    if not low <= value <= high:
        raise WrongShape(f"{codec}: parameter {key} should be within {low}..{high}, is {value}")
    return value


def bits_param(codec: str, params: Params, key: str, allowed: tuple[int, ...]) -> int:
    """Return the bit width `key`; one that this reader cannot unpack is a version problem."""
    bits = int_param(codec, params, key, 1, 64)
    if bits not in allowed:
        raise UnsupportedVersion(f"{codec}: {key} {bits} is not one of {list(allowed)}")
    return bits


def float_param(codec: str, params: Params, key: str) -> float:
    """Return the finite number `key`."""
    value = params.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Corrupt(f"{codec}: parameter {key} should be a number, found {value!r:.40}")
    if not abs(value) <= _MAX_NUMBER:  # also false for NaN
        raise NonFinite(f"{codec}: parameter {key} is not finite")
    return float(value)


def unit_param(codec: str, params: Params, key: str) -> float:
    """Return the positive float16 unit `key`."""
    unit = float_param(codec, params, key)
    if not 0 < unit <= _MAX_UNIT:
        raise NonFinite(f"{codec}: {key} {unit} would overflow or vanish in float32")
    return unit


def check_ids(ids: Tensor, rows: int) -> None:
    """Row numbers are within the matrix; negative ones do not count from the end."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise IndexError(f"row ids must be within 0..{rows - 1}")
