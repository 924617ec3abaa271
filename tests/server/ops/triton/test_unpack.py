"""The unpacking instructions, run by a few lines of Python: one PTX instruction each."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from server.ops.triton.unpack import FORMATS, field_assembly

HALF = st.integers(0, 0xFFFF)


def run(program: str, inputs: dict[str, int]) -> int:
    """Execute ``shr``, ``shl`` and ``lop3`` on 32-bit registers; return ``$0``."""
    registers = dict(inputs)

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    body = program.removeprefix("{ .reg .b32 t, a; ").removesuffix(" }")
    for line in body.split(";")[:-1]:
        name, operands = re.fullmatch(r"\s*(\w+)\.b32 (.*)", line).groups()  # type: ignore[union-attr]
        target, *arguments = [part.strip() for part in operands.split(",")]
        numbers = [value(a) for a in arguments]
        if name == "shr":
            registers[target] = numbers[0] >> numbers[1]
        elif name == "shl":
            registers[target] = numbers[0] << numbers[1] & 0xFFFFFFFF
        else:
            registers[target] = lop3(*numbers)
    return registers["$0"]


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit i of the result is bit ``4 a_i + 2 b_i + c_i`` of the table (PTX ISA, lop3)."""
    result = 0
    for i in range(32):
        index = (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)
        result |= (table >> index & 1) << i
    return result


def as_floats(register: int, dtype: torch.dtype) -> list[float]:
    halves = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32)
    return halves.to(torch.uint16).view(dtype).tolist()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bits", [2, 4])
@given(words=st.tuples(HALF, HALF))
def test_field_programs_give_sixteen_plus_code(
    bits: int, dtype: torch.dtype, words: tuple[int, int]
) -> None:
    register = words[0] | words[1] << 16
    programs = field_assembly(bits, FORMATS[dtype])
    assert len(programs) == 16 // bits
    for u, program in enumerate(programs):
        codes = [16.0 + (word >> u * bits & (1 << bits) - 1) for word in words]
        assert as_floats(run(program, {"$1": register}), dtype) == codes


@pytest.mark.parametrize("dtype", FORMATS)
@given(low=st.tuples(HALF, HALF), high=st.tuples(HALF, HALF))
def test_three_bit_programs_join_both_planes(
    dtype: torch.dtype, low: tuple[int, int], high: tuple[int, int]
) -> None:
    registers = {"$1": low[0] | low[1] << 16, "$2": high[0] | high[1] << 16}
    programs = field_assembly(3, FORMATS[dtype])
    assert len(programs) == 16
    for u, program in enumerate(programs):
        byte, field = divmod(u, 8)
        at = 8 * byte + 2 * (field // 2)
        codes = [16.0 + (a >> at & 3) + 4 * (b >> u & 1) for a, b in zip(low, high, strict=True)]
        assert as_floats(run(program, registers), dtype) == codes
