"""How packed blocks lie in device memory, against a reading bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.ops.packed import pack_columns, packed_rows, unpack_columns


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 2**31 - 1),
)
def test_pack_columns_any_size_round_trips(nb: int, mb: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (2, nb, mb), dtype=torch.uint8, generator=generator)
    packed = pack_columns(codes, bits)
    assert packed.shape == (2, packed_rows(nb, bits), mb)
    assert torch.equal(unpack_columns(packed, bits, nb), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_columns_each_field_holds_a_run_of_inputs(bits: int) -> None:
    nb, mb, fields = 13, 3, 8 // bits
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (nb, mb), dtype=torch.uint8, generator=generator)
    packed = pack_columns(codes, bits)
    rows = -(-nb // fields)
    for j, i in itertools.product(range(nb), range(mb)):
        field, row = divmod(j, rows)
        assert (int(packed[row, i]) >> (field * bits)) & ((1 << bits) - 1) == int(codes[j, i])


def test_pack_columns_three_bits_are_a_plane_of_two_and_one_of_one() -> None:
    nb = 11
    codes = (torch.arange(nb) % 8).to(torch.uint8).unsqueeze(1)
    packed = pack_columns(codes, 3)
    low, high = packed[:3, 0].tolist(), packed[3:, 0].tolist()
    assert len(high) == 2
    for j in range(nb):
        two = (low[j % 3] >> (2 * (j // 3))) & 3
        one = (high[j % 2] >> (j // 2)) & 1
        assert two + 4 * one == int(codes[j])
