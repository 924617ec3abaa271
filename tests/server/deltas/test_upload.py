"""Uploads through a ring of small buffers, on the CPU."""

from __future__ import annotations

import pytest
import torch

from server.deltas.upload import SlotUploader

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(7,), (1, 200), (5, 33), (3, 4, 5), (2, 0), ()])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_copy_larger_and_smaller_than_the_buffers_arrives_whole(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, 100, shape, generator=generator).to(dtype)
    target = torch.zeros_like(source)
    upload = SlotUploader(CPU, chunk_bytes=48, ring=2).copy([(target, source)])
    assert upload.done()
    upload.wait()
    assert torch.equal(target, source)


def test_copy_into_a_slot_slice_leaves_its_neighbours() -> None:
    array = torch.zeros(3, 4, 10)
    source = torch.arange(4.0 * 6).view(4, 6)
    SlotUploader(CPU, chunk_bytes=64).copy([(array[1, :, 2:8], source)])
    assert torch.equal(array[1, :, 2:8], source)
    assert float(array.sum()) == float(source.sum())


def test_copy_other_dtype_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        SlotUploader(CPU).copy([(torch.zeros(3), torch.zeros(3, dtype=torch.float16))])
