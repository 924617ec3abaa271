"""Codes in the order that kernels read: bytes packed along the inputs of a product.

Along the inputs (the contraction axis), so that every field of a byte row yields a contiguous run
of inputs and every byte row a contiguous run of outputs: no shuffle in a kernel.

    bits 2, 4, 8   F = 8 / bits fields; byte row j holds the inputs ``j + f * ceil(N / F)`` in bits
                   ``[f * bits, (f + 1) * bits)``
    bits 3         two planes, one after the other: the low two bits of every code packed as 2-bit
                   codes, then the high bits packed as 1-bit codes
    bits 16        float16 values, one row an input

An artifact holds codes in this order where they fill its bytes (`fills_bytes`): it is not larger
than with a bit stream, and a server takes the array as it is. A part tells which of the two it is
by its dimensions: a bit stream has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.codecs.packing import check_stream
from compressor.codecs.validate import check_part
from compressor.errors import WrongShape

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of each plane, the lowest first


def fills_bytes(n_inputs: int, bits: int) -> bool:
    """Whether that many codes, packed together, leave no bit of their bytes unused."""
    return bits in PLANES and 8 % bits == 0 and n_inputs * bits % 8 == 0


def packed_rows(n_inputs: int, bits: int) -> int:
    """Byte rows that `n_inputs` inputs take (rows of float16 for 16 bits)."""
    if bits == 16:
        return n_inputs
    return sum(-(-n_inputs * plane // 8) for plane in PLANES[bits])


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack along the second last axis: uint8 [..., N, outputs] -> uint8 [..., byte rows, outputs].

    For 16 bits the float16 values pass unchanged.
    """
    if bits == 16:
        return codes
    parts, low = [], 0
    for plane in PLANES[bits]:
        mask = (1 << plane) - 1
        parts.append(_pack_plane((codes >> low) & mask, plane))
        low += plane
    return torch.cat(parts, dim=-2)


def unpack_columns(packed: Tensor, bits: int, n_inputs: int) -> Tensor:
    """Inverse of `pack_columns`: uint8 [..., byte rows, outputs] -> uint8 [..., N, outputs]."""
    if bits == 16:
        return packed
    codes: Tensor | None = None
    start, low = 0, 0
    for plane in PLANES[bits]:
        rows = -(-n_inputs * plane // 8)
        part = _unpack_plane(packed[..., start : start + rows, :], plane, n_inputs) << low
        codes = part if codes is None else codes | part
        start, low = start + rows, low + plane
    assert codes is not None
    return codes


def stored_codes(
    codec: str,
    tensors: dict[str, Tensor],
    name: str,
    bits: int,
    n_codes: int,
    columns: tuple[int, ...] | None,
) -> Tensor:
    """Return part `name`, packed, after checking that it is a bit stream of `n_codes` codes or the
    array `columns` in the order of kernels (None where the sizes do not fill its bytes). Nothing
    is unpacked. Raises WrongShape, or Corrupt if a padding bit is set.
    """
    part = tensors[name]
    if part.ndim == 1:
        check_stream(part, bits, n_codes)
        return part
    if columns is None:
        raise WrongShape(
            f"{codec}: part {name} should be a bit stream: codes of {bits} bits and these sizes do "
            f"not fill the bytes of an array, found {list(part.shape)}"
        )
    return check_part(codec, tensors, name, torch.uint8, columns)


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    """Along the inputs, where a term's codes are contiguous; the result is transposed back."""
    by_output = codes.transpose(-1, -2)
    n_inputs, fields = by_output.shape[-1], 8 // bits
    rows = -(-n_inputs // fields)
    packed = by_output.new_zeros((*by_output.shape[:-1], rows))
    for field in range(fields):
        part = by_output[..., field * rows : (field + 1) * rows]
        packed[..., : part.shape[-1]] |= part << (field * bits)
    return packed.transpose(-1, -2)


def _unpack_plane(packed: Tensor, bits: int, n_inputs: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1, 1)
    fields = (packed.unsqueeze(-3) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(-3, -2)[..., :n_inputs, :]
