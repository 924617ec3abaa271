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


def test_upload_on_a_gpu_arrives_when_done_through_buffers_nobody_still_reads() -> None:
    pytest.importorskip("triton")  # of the simulated device
    from tests.simulated_cuda import simulated_cuda

    source = torch.arange(50, dtype=torch.float32)
    with simulated_cuda():
        device = torch.device("cuda")
        targets = [torch.zeros(50, device=device) for _ in range(3)]
        uploader = SlotUploader(device, chunk_bytes=64, ring=2)
        upload = uploader.copy([(target, source) for target in targets], after=uploader.ready())
        assert targets[2].tolist() != source.tolist()
        assert not upload.done()
        upload.wait()
        assert upload.done()
        assert all(target.tolist() == source.tolist() for target in targets)
        late = torch.zeros(50, device=device)
        uploader.copy([(late, source)])
        uploader.abandon()
        assert late.tolist() == source.tolist(), "nothing is under way any more"
