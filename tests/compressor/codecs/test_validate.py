"""The checks that `from_parts` of every codec shares, by themselves."""

from __future__ import annotations

import pytest
import torch

from compressor.codecs.validate import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_is_finite_finds_one_bad_element_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    largest = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
    largest[::2] *= -1
    assert is_finite(largest)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in {0, size // 2, size - 1}:
            damaged = largest.clone()
            damaged[place] = bad
            assert not is_finite(damaged)
            assert not is_finite(damaged.view(1, -1))
