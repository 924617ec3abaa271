"""What it runs on, how fast its memory is, and the server's own check of its kernels."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time

import numpy
import torch
import transformers
import triton

from benchmarks.gpu.predict import BANDWIDTH
from benchmarks.gpu.report import Report
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.timing import copy_bandwidth
from server.ops.selfcheck import check_kernels
from server.ops.triton.kernels import TritonKernels


def commit() -> str:
    """Of the working copy; a copy without its history, or a machine without git, has none."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def device(scope: Scope, report: Report) -> bool:
    cuda = scope.device.type == "cuda"
    name = torch.cuda.get_device_name(scope.device) if cuda else "CPU, interpreter: no measurement"
    report.line(f"\n## {scope.shape.name} on {name}\n")
    report.line(
        f"python {platform.python_version()}, torch {torch.__version__}, triton "
        f"{triton.__version__}, transformers {transformers.__version__}, numpy "
        f"{numpy.__version__}, commit {commit()}"
    )
    report.line(
        f"\ncopy bandwidth: {copy_bandwidth(scope) / 1e9:.0f} GB/s ({BANDWIDTH / 1e9:.0f} expected)"
    )
    start = time.perf_counter()
    try:
        check_kernels(TritonKernels(scope.device), scope.device, scope.dtype)
    except ValueError as error:
        report.line(f"\nSTART-UP CHECK FAILED: {error}")
        return False
    seconds = time.perf_counter() - start
    report.line(f"\nstart-up check of every kernel: passed, {seconds:.0f} s")
    return True
