"""Which kernels a device and a compute dtype get; Triton's are checked on the device first."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal

import torch

from server.ops.kernels import CompileKernels, Kernels, TorchKernels

log = logging.getLogger(__name__)
KernelChoice = Literal["auto", "torch", "numba", "triton"]


def choose_kernels(
    choice: KernelChoice,
    device: torch.device,
    dtype: torch.dtype,
    compile_kernels: CompileKernels = "wait",
) -> Kernels:
    """The kernels for this device and compute dtype. ValueError if `choice` cannot run there.

    compile_kernels  when those for the CPU are compiled where they never were
    """
    if choice == "triton" or (choice == "auto" and device.type == "cuda" and _has_triton()):
        return _triton_kernels(device, dtype)
    fits = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if choice == "numba" and not fits:
        raise ValueError("numba kernels run on the CPU in float32 or bfloat16 only")
    if choice == "torch" or not fits:
        return TorchKernels()
    if find_spec("numba") is None:
        if choice == "numba":
            raise ValueError("numba is not installed; `pip install numba`")
        log.warning("numba is not installed: deltas run in plain torch, slower; pip install numba")
        return TorchKernels()
    from server.ops.cpu.kernels import numba_kernels

    return numba_kernels(compile_kernels)


def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        log.warning(
            "triton is not installed: plain torch runs, slow; pip install 'impart-serve[gpu]'"
        )
    return found


def _triton_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type != "cuda":
        raise ValueError("triton kernels run on CUDA devices only")
    if find_spec("triton") is None:
        raise ValueError("triton is not installed; `pip install 'impart-serve[gpu]'`")
    from server.ops.selfcheck import check_kernels
    from server.ops.triton.kernels import TritonKernels

    log.info(
        "the server compiles the Triton kernels and compares them with torch on the device; that "
        "takes up to minutes where they were never compiled"
    )
    kernels = TritonKernels(device)
    check_kernels(kernels, device, dtype)
    return kernels
