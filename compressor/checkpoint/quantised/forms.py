"""The forms in which a matrix is stored quantised: which tensors, and how they belong together.

Shapes are those of the dense matrix, ``[out, in]``. Nothing here imports torch; the values are
made in `compressor.checkpoint.quantised.values`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GptqForm:
    """Integers packed along the inputs: ``W[o, i] = (q - zero) * scale`` with the group of ``i``.

    qweight  int32 ``[in * bits / 32, out]``, a stream of bits down each column
    qzeros   int32 ``[groups, out * bits / 32]``, a stream of bits along each row
    scales   floats ``[groups, out]``
    g_idx    int32 ``[in]``, the group of each input; None: groups of `group` inputs, in order
    added    what is added to a stored zero (modulo ``2 ** bits``): 1 in version 1 of the format
    """

    shape: tuple[int, int]
    bits: int
    qweight: str
    qzeros: str
    scales: str
    g_idx: str | None
    group: int
    added: int


@dataclass(frozen=True, slots=True)
class AwqForm:
    """4-bit integers packed along the outputs, eight in an order of their own.

    qweight  int32 ``[in, out / 8]``; qzeros int32 ``[groups, out / 8]``; scales ``[groups, out]``
    """

    shape: tuple[int, int]
    qweight: str
    qzeros: str
    scales: str
    group: int


@dataclass(frozen=True, slots=True)
class PackedForm:
    """Signed integers plus half their range, packed along the inputs (compressed-tensors).

    packed      int32 ``[out, in * bits / 32]``
    scale       floats ``[out, groups]``
    zero_point  int32 ``[out * bits / 32, groups]``, packed along the outputs, or int8
                ``[out, groups]``; None: zeros
    g_idx       as of `GptqForm`
    """

    shape: tuple[int, int]
    bits: int
    packed: str
    scale: str
    zero_point: str | None
    g_idx: str | None
    group: int


@dataclass(frozen=True, slots=True)
class ScaledForm:
    """Float8 or int8 values with a scale for each block of `block` rows and columns.

    weight      ``[out, in]``
    scale       ``[ceil(out / rows), ceil(in / columns)]``, or as many elements of another shape
    zero_point  int8, as many as scales; None: zeros
    factor      what every value is multiplied by too
    """

    shape: tuple[int, int]
    weight: str
    scale: str
    block: tuple[int, int]
    zero_point: str | None = None
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LookupForm:
    """4-bit indices into a table, blocks of elements with a scale (bitsandbytes).

    packed      bytes, two elements each, the first in the upper half
    table       float32 ``[16]``
    absmax      float32, one a block of `block` elements; or bytes, if it is quantised itself:
    nested      None, or the names of its table ``[256]`` and of its own scales
    """

    shape: tuple[int, ...]
    packed: str
    table: str
    absmax: str
    block: int
    nested: tuple[str, str] | None = None
    nested_block: int = 0
    nested_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Mxfp4Form:
    """Experts of 4-bit floats (E2M1), 32 with one power of two; dense ``[experts, in, out]``.

    blocks  bytes ``[experts, out, in / 32, 16]``, the first of two elements in the lower half
    scales  bytes ``[experts, out, in / 32]``, the exponent plus 127
    """

    shape: tuple[int, int, int]
    blocks: str
    scales: str


Form = GptqForm | AwqForm | PackedForm | ScaledForm | LookupForm | Mxfp4Form
