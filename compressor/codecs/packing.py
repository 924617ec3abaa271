"""Bit packing: small integer codes to bytes and back, no bit wasted.

The packed form is one little-endian bit stream: element ``e`` of ``bits`` bits lies in stream
bits ``[e * bits, (e + 1) * bits)``, stream bit ``t`` is bit ``t % 8`` of byte ``t // 8``. Bits
past the last element in the last byte are zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compressor.errors import Corrupt, WrongShape

_GROUP = 8  # eight codes of b bits fill exactly b bytes, whatever b is


def packed_size(n: int, bits: int) -> int:
    """Bytes that `n` codes of `bits` bits take."""
    return -(-n * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` uint8 ``[N]``, each below ``2**bits``, into uint8 ``[ceil(N * bits / 8)]``."""
    _check_bits(bits)
    assert codes.dtype == torch.uint8
    assert codes.ndim == 1
    assert codes.numel() == 0 or int(codes.max()) < 1 << bits
    n = codes.numel()
    if bits == 8:
        return codes.clone()
    groups = -(-n // _GROUP)
    padded = torch.zeros(groups * _GROUP, dtype=torch.uint8)
    padded[:n] = codes
    lanes = padded.view(groups, _GROUP).T.contiguous()
    out = torch.zeros(bits, groups, dtype=torch.uint8)
    for lane in range(_GROUP):
        byte, shift = divmod(lane * bits, 8)
        out[byte] |= lanes[lane] << shift  # uint8: what does not fit falls off the top ...
        if shift + bits > 8:
            out[byte + 1] |= lanes[lane] >> (8 - shift)  # ... and goes to the next byte
    return out.T.reshape(-1)[: packed_size(n, bits)].clone()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 ``[ceil(n * bits / 8)]`` -> uint8 ``[n]``.

    Raises as `check_stream`.
    """
    check_stream(packed, bits, n)
    expected = packed_size(n, bits)
    if 8 % bits == 0:
        return _split_bytes(packed, bits)[:n]
    groups = -(-n // _GROUP)
    padded = torch.zeros(groups * bits, dtype=torch.uint8)
    padded[:expected] = packed
    source = padded.view(groups, bits).T.contiguous()
    lanes = torch.empty(_GROUP, groups, dtype=torch.uint8)
    for lane in range(_GROUP):
        byte, shift = divmod(lane * bits, 8)
        value = source[byte] >> shift
        if shift + bits > 8:
            value |= source[byte + 1] << (8 - shift)
        lanes[lane] = value & ((1 << bits) - 1)
    return lanes.T.reshape(-1)[:n].clone()


def check_stream(packed: Tensor, bits: int, n: int) -> None:
    """Check that `packed` is what `pack_bits` can return for `n` codes.

    Raises WrongShape if it is not uint8 of exactly that length, Corrupt if a padding bit is set.
    """
    _check_bits(bits)
    expected = packed_size(n, bits)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != expected:
        raise WrongShape(
            f"packed codes: expected {expected} bytes for {n} codes of {bits} bit, "
            f"found {list(packed.shape)} of {packed.dtype}"
        )
    used = n * bits % 8
    if used and int(packed[-1]) >> used:
        raise Corrupt("packed codes: padding bits after the last code are not zero")


def codes_at(packed: Tensor, bits: int, places: Tensor) -> Tensor:
    """Return the codes at ``places [...]`` int64 of a stream, uint8 ``[...]``; unpacks no other."""
    _check_bits(bits)
    first_bit = places * bits
    byte = first_bit >> 3
    value = packed[byte].to(torch.int32)
    if 8 % bits:  # a code may go on in the next byte; behind the last one there is none
        value |= packed[(byte + 1).clamp(max=len(packed) - 1)].to(torch.int32) << 8
    return ((value >> (first_bit & 7)) & ((1 << bits) - 1)).to(torch.uint8)


def _split_bytes(packed: Tensor, bits: int) -> Tensor:
    """Codes that do not cross bytes: numpy, which is several times faster at strided stores."""
    source, per_byte = packed.numpy(), 8 // bits
    codes = np.empty((len(source), per_byte), dtype=np.uint8)
    for place in range(per_byte):
        codes[:, place] = (source >> (place * bits)) & ((1 << bits) - 1)
    return torch.from_numpy(codes.reshape(-1))


def _check_bits(bits: int) -> None:
    assert 1 <= bits <= 8, f"bits must be within 1..8, got {bits}"
