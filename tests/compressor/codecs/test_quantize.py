from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.codecs.quantize import (
    QUANT_BITS,
    dequantize,
    from_half,
    from_octaves,
    octave_unit,
    quantize_rows,
    to_half,
    to_octaves,
    unit_for,
)


def best_error(row: np.ndarray, bits: int) -> float:
    """Least squared error over a very fine grid of scales, in float64."""
    top = (2**bits - 1) / 2
    found = np.inf
    for scale in np.linspace(0.02, 1.3, 2500) * np.abs(row).max() / top:
        code = np.clip(np.round(row / scale + top), 0, 2**bits - 1)
        found = min(found, float(((row - (code - top) * scale) ** 2).sum()))
    return found


@pytest.mark.parametrize("bits", QUANT_BITS)
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "short"])
def test_quantize_rows_random_rows_is_near_the_least_squares_optimum(bits: int, kind: str) -> None:
    rng = np.random.default_rng(bits)
    rows = {
        "normal": rng.normal(size=(6, 72)),
        "uniform": rng.uniform(-1, 1, size=(6, 72)),
        "heavy": rng.standard_t(3, size=(6, 72)),
        "short": rng.normal(size=(6, 3)),
    }[kind]
    codes, scales = quantize_rows(torch.from_numpy(rows).float(), bits)
    assert int(codes.max()) < 2**bits
    got = dequantize(codes, scales, bits).double().numpy()
    error = ((rows - got) ** 2).sum()
    best = sum(best_error(row, bits) for row in rows)
    if kind == "short":  # three values can be fitted almost exactly by a lucky scale
        assert error <= best + 0.5**bits * 0.05 * (rows**2).sum()
    else:
        assert error <= best * (1.2 if bits == 8 else 1.02)


def test_quantize_rows_zero_row_has_scale_zero() -> None:
    x = torch.zeros(3, 5)
    x[1] = 1.0
    for bits in QUANT_BITS:
        codes, scales = quantize_rows(x, bits)
        assert scales[0] == scales[2] == 0
        assert torch.equal(dequantize(codes, scales, bits)[[0, 2]], torch.zeros(2, 5))


def test_quantize_rows_two_bit_levels_are_half_and_one_and_a_half() -> None:
    x = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) * 3e-4
    codes, scales = quantize_rows(x, 2)
    assert codes.tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(scales, torch.tensor([3e-4]))


@pytest.mark.parametrize("bits", QUANT_BITS)
def test_quantize_rows_many_chunks_equals_row_by_row(bits: int) -> None:
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_rows(x, bits)
    for row in (0, 186, 187, 188, 299):
        one_codes, one_scale = quantize_rows(x[row : row + 1], bits)
        assert torch.equal(one_codes[0], codes[row])
        torch.testing.assert_close(one_scale[0], scales[row], rtol=4e-6, atol=0)


@given(st.floats(1e-30, 1e17), st.integers(0, 100))
def test_unit_for_any_magnitude_keeps_full_half_precision(magnitude: float, seed: int) -> None:
    x = torch.randn(20, generator=torch.Generator().manual_seed(seed)) * magnitude
    unit = unit_for(x)
    assert np.log2(unit) == int(np.log2(unit))
    back = from_half(to_half(x, unit), unit)
    torch.testing.assert_close(back, x, rtol=2**-11, atol=2.0**-24 * unit)
    assert torch.equal(to_half(back, unit), to_half(x, unit))


def test_unit_for_zeros_is_one() -> None:
    assert unit_for(torch.zeros(3), torch.zeros(0)) == 1.0


@given(st.lists(st.floats(1e-30, 1e30) | st.just(0.0), min_size=1, max_size=20))
def test_octaves_any_scales_come_back_within_half_a_step_or_as_zero(values: list[float]) -> None:
    scales = torch.tensor(values, dtype=torch.float32)
    unit = octave_unit(scales)
    stored = to_octaves(scales, unit)
    assert stored.dtype == torch.uint8
    back = from_octaves(stored, unit).double()
    largest = float(scales.max())
    for value, got in zip(scales.double().tolist(), back.tolist(), strict=True):
        if value < largest * 2**-16.8:
            assert got <= largest * 2**-14.8
        elif value:
            assert abs(np.log2(got / value)) <= 0.5 / 16 + 1e-6 or value < largest * 2**-14.8
        else:
            assert got == 0


def test_octaves_largest_is_within_the_unit_and_half_of_it() -> None:
    for largest in (1.0, 0.75, 1e-6, 3e8):
        unit = octave_unit(torch.tensor([largest, 0.0]))
        assert unit / 2 < largest <= unit
        assert np.log2(unit) == round(np.log2(unit))
    assert octave_unit(torch.zeros(3)) == 1.0
