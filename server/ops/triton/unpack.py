"""From packed codes to numbers a dot product takes, two at a time.

A code ``c`` becomes ``16 + c``, exactly, by placing its bits in the mantissa of 16.0: bfloat16
steps by 1/8 there (bit 3), float16 by 1/64 (bit 6). On a GPU a 32-bit register holds the same
field of two inputs, so one shift and one ``lop3`` give two values; left to the compiler the same
takes about four instructions a value (counted in SASS for sm_90), which would bind 4-bit codes to
less than half of the memory's speed. The subtraction of ``16 + mid`` happens once per output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.ops.triton.compat import INTERPRET


@dataclass(frozen=True, slots=True)
class HalfFormat:
    """16.0 and the mantissa bit that is worth 1 there."""

    sixteen: int
    one_bit: int


FORMATS = {torch.bfloat16: HalfFormat(0x4180, 3), torch.float16: HalfFormat(0x4C00, 6)}


def unpack_assembly(bits: int, word: int, dtype: torch.dtype) -> tuple[str, ...] | None:
    """PTX for each field of a word of `word` bytes; None where the kernel unpacks plainly.

    ``$0`` two values of `dtype`, ``$1`` two words; at 3 bit ``$1`` is the low plane's (even fields)
    or the odd half's words and ``$2`` the high plane's.
    """
    if INTERPRET or word != 2 or bits >= 8 or dtype not in FORMATS:
        return None
    return field_assembly(bits, FORMATS[dtype])


def field_assembly(bits: int, form: HalfFormat) -> tuple[str, ...]:
    """`unpack_assembly` for 16-bit words."""
    if bits == 3:
        return tuple(
            _program(
                _take("$1", u // 8 * 8 + u % 8 // 2 * 2, 2, form.one_bit, _twice(form.sixteen), "a")
                + _take("$2", u, 1, form.one_bit + 2, "a", "$0")
            )
            for u in range(16)
        )
    return tuple(
        _program(_take("$1", u * bits, bits, form.one_bit, _twice(form.sixteen), "$0"))
        for u in range(16 // bits)
    )


def _program(lines: list[str]) -> str:
    return "{ .reg .b32 t, a; " + " ".join(lines) + " }"


def _take(source: str, at: int, bits: int, to: int, other: str, out: str) -> list[str]:
    """``out = (source's bits at .. at + bits, moved to bit `to`) | other``, in both halves.

    Bits that a shift moves across the halves are masked away.
    """
    lines, moved = [], source
    if at > to:
        lines.append(f"shr.b32 t, {source}, {at - to};")
        moved = "t"
    elif at < to:
        lines.append(f"shl.b32 t, {source}, {to - at};")
        moved = "t"
    mask = _twice(((1 << bits) - 1) << to)
    lines.append(f"lop3.b32 {out}, {moved}, {mask}, {other}, 0xEA;")  # (moved & mask) | other
    return lines


def _twice(half: int) -> str:
    return f"0x{half:04X}{half:04X}"
