"""The simulated GPU refuses what CUDA refuses, and does the rest as CUDA would."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.simulated_cuda import Device, SimulationError, simulated_cuda

CUDA = torch.device("cuda")


@pytest.fixture
def gpu() -> Iterator[Device]:
    with simulated_cuda() as device:
        yield device


@triton.jit
def _double_kernel(x, n, TILE: tl.constexpr):  # noqa: N803
    i = tl.arange(0, TILE)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


def test_results_are_on_the_device_and_right(gpu: Device) -> None:
    host = torch.randn(4, 8)
    x = host.to(CUDA)
    assert x.device == torch.device("cuda", 0)
    assert (x @ x.T).relu().is_cuda
    assert torch.equal((x @ x.T).cpu(), host @ host.T)
    assert x.topk(2).indices.is_cuda
    assert not x.cpu().is_cuda
    assert torch.zeros_like(x).is_cuda
    assert float(x[0, 0] + torch.tensor(1.0)) == float(host[0, 0] + 1), "scalars may be mixed"
    moved = nn.Linear(8, 2).to(CUDA)
    assert moved(x).is_cuda
    assert isinstance(moved.weight, nn.Parameter)


def test_copies_do_not_share_memory_with_the_host(gpu: Device) -> None:
    host = torch.zeros(3)
    x = host.to(CUDA)
    x.fill_(1)
    back = x.cpu()
    x.fill_(2)
    assert host.tolist() == [0, 0, 0]
    assert back.tolist() == [1, 1, 1]


def test_tensors_of_two_places_in_one_operation_are_refused(gpu: Device) -> None:
    x = torch.zeros(2, 3, device=CUDA)
    with pytest.raises(SimulationError, match="cuda:0 and on the CPU"):
        x + torch.zeros(3)
    with pytest.raises(SimulationError, match="cuda:0 and on the CPU"):
        torch.cat([x, torch.zeros(2, 3)])
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(SimulationError, match="kernel gets a CPU tensor"):
        _double_kernel[(1,)](torch.zeros(4), 4, TILE=4)


def test_threads_started_inside_see_the_device(gpu: Device) -> None:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2, device=CUDA)))
    thread.start()
    thread.join()
    assert found[0].is_cuda


def test_graph_replays_its_operations_and_kernels_on_its_own_memory(gpu: Device) -> None:
    x, calls = torch.ones(4, device=CUDA), []
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y = x + 1
        _double_kernel[(1,)](y, 4, TILE=4)
        z = torch.cat([y[:2] - 1, y[2:]])
        calls.append(1)
    x.copy_(torch.tensor([0.0, 1, 2, 3], device=CUDA))
    graph.replay()
    assert z.tolist() == [1, 3, 6, 8]
    assert calls == [1], "Python does not run at replay"
    moved = x.clone()
    moved.fill_(9)
    graph.replay()
    assert z.tolist() == [1, 3, 6, 8], "of what was captured, not of what replaced it"


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x[x.long()[0]],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0], device=CUDA),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.ones(4).to(CUDA),
        lambda x: torch.cuda.synchronize(),
        lambda x: 3.0 in x,
    ],
)
def test_capture_refuses_what_waits_or_copies(gpu: Device, waits) -> None:
    x = torch.ones(4, device=CUDA)
    waits(x)  # which is right outside
    with (
        pytest.raises((SimulationError, AssertionError)),
        torch.inference_mode(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        waits(x)


def test_pinned_memory_is_in_use_until_its_copy_was_waited_for(gpu: Device) -> None:
    pinned = torch.zeros(4, pin_memory=True)
    x, event = torch.empty(4, device=CUDA), torch.cuda.Event()
    pinned[0] = 5
    x.copy_(pinned, non_blocking=True)
    event.record()
    for write in (lambda: pinned.fill_(1), lambda: pinned[1:].copy_(torch.ones(3))):
        with pytest.raises(SimulationError, match="may still read it"):
            write()
    event.synchronize()
    pinned.fill_(1)
    assert x.tolist() == [5, 0, 0, 0]


def test_a_copy_on_another_stream_has_not_arrived_until_waited_for(gpu: Device) -> None:
    pinned = torch.ones(2, pin_memory=True)
    x, stream, event = torch.zeros(2, device=CUDA), torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        x.copy_(pinned, non_blocking=True)
        event.record(stream)
    assert x.tolist() == [0, 0], "too early"
    assert not event.query()
    assert event.query()
    assert x.tolist() == [1, 1]


def test_a_copy_to_the_host_has_not_arrived_until_waited_for(gpu: Device) -> None:
    pinned, event = torch.zeros(2, dtype=torch.int64, pin_memory=True), torch.cuda.Event()
    x = torch.tensor([3, 4], device=CUDA)
    pinned.copy_(x, non_blocking=True)
    event.record()
    x.fill_(9)
    assert pinned.tolist() != [3, 4]
    event.synchronize()
    assert pinned.tolist() == [3, 4]


def test_outside_nothing_has_changed() -> None:
    with simulated_cuda():
        pass
    assert torch.zeros(1).device.type == "cpu"
    assert isinstance(torch.nn.Linear(1, 1).to("cpu").weight, nn.Parameter)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_stream()
