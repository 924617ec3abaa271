from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.codecs.packing import codes_at, pack_bits, packed_size, unpack_bits
from compressor.errors import Corrupt, WrongShape
from tests.compressor.codec_oracles import bit_codes


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(coded())
def test_pack_bits_any_width_and_length_is_the_little_endian_bit_stream(case) -> None:
    bits, codes = case
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.numel() == packed_size(len(codes), bits) == -(-len(codes) * bits // 8)
    whole = sum(code << (index * bits) for index, code in enumerate(codes))
    assert bytes(packed.tolist()) == whole.to_bytes(packed.numel(), "little")
    assert bit_codes(packed, bits, len(codes)) == codes
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(coded(), st.randoms(use_true_random=False))
def test_codes_at_any_places_are_the_codes_there(case, random) -> None:
    bits, codes = case
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    places = [random.randrange(len(codes)) for _ in range(6 if codes else 0)]
    found = codes_at(packed, bits, torch.tensor(places, dtype=torch.int64).view(-1, 2))
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == [codes[place] for place in places]


@pytest.mark.parametrize(("bits", "n"), [(2, 3), (3, 5), (4, 1), (3, 1), (1, 7)])
def test_unpack_bits_set_padding_bit_raises_corrupt(bits: int, n: int) -> None:
    packed = pack_bits(torch.zeros(n, dtype=torch.uint8), bits)
    for bit in range(n * bits % 8, 8):
        damaged = packed.clone()
        damaged[-1] |= 1 << bit
        with pytest.raises(Corrupt, match="padding"):
            unpack_bits(damaged, bits, n)


@pytest.mark.parametrize("change", [-1, 1])
def test_unpack_bits_wrong_length_raises_wrong_shape(change: int) -> None:
    packed = torch.zeros(packed_size(11, 3) + change, dtype=torch.uint8)
    with pytest.raises(WrongShape):
        unpack_bits(packed, 3, 11)


def test_unpack_bits_wrong_dtype_raises_wrong_shape() -> None:
    with pytest.raises(WrongShape):
        unpack_bits(torch.zeros(5, dtype=torch.int16), 3, 11)


def test_pack_bits_result_does_not_share_memory_with_codes() -> None:
    codes = torch.arange(4, dtype=torch.uint8)
    packed = pack_bits(codes, 8)
    codes.zero_()
    assert packed.tolist() == [0, 1, 2, 3]
