"""What it runs on, how fast its memory is, and the server's own check of its kernels."""

from __future__ import annotations

import platform
import subprocess
import time

import numpy
import torch
import transformers
import triton

from benchmarks.gpu.plan import Plan
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import copy_bandwidth
from server.ops.triton.kernels import TritonKernels
from server.ops.triton.selfcheck import check_kernels


def device(plan: Plan, report: Report) -> bool:
    cuda = plan.device.type == "cuda"
    name = torch.cuda.get_device_name(plan.device) if cuda else "CPU, interpreter: no measurement"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report.line(f"\n## {plan.shape.name} on {name}\n")
    report.line(
        f"python {platform.python_version()}, torch {torch.__version__}, triton "
        f"{triton.__version__}, transformers {transformers.__version__}, numpy "
        f"{numpy.__version__}, commit {commit or 'unknown'}"
    )
    report.line(f"\ncopy bandwidth: {copy_bandwidth(plan) / 1e9:.0f} GB/s")
    start = time.perf_counter()
    try:
        check_kernels(TritonKernels(plan.device), plan.device, plan.dtype)
    except ValueError as error:
        report.line(f"\nSTART-UP CHECK FAILED: {error}")
        return False
    seconds = time.perf_counter() - start
    report.line(f"\nstart-up check of every kernel: passed, {seconds:.0f} s with compiling")
    return True
