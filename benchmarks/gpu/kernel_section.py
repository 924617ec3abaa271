"""Every kernel: time, share of the copy bandwidth, deviation from float64, and the prediction."""

from __future__ import annotations

import gc

import torch

from benchmarks.gpu.plan import Plan
from benchmarks.gpu.predict import kernel_seconds
from benchmarks.gpu.report import Report
from benchmarks.gpu.specs import all_specs
from benchmarks.gpu.timing import copy_bandwidth, timed

COLUMNS = ("kernel", "MB", "expected us", "us", "of copy", "TFLOP/s", "off float64 by")


def kernels(plan: Plan, report: Report) -> bool:
    """Whether every kernel runs and is within its bound; one that fails does not stop the rest."""
    bandwidth = copy_bandwidth(plan)
    report.table("Kernels, one layer's launches", *COLUMNS)
    correct = True
    for spec in all_specs(plan.shape, plan.codecs, plan.sizes):
        size, expected = f"{spec.n_bytes / 1e6:.2f}", f"{kernel_seconds(spec) * 1e6:.1f}"
        try:
            case = spec.make(plan.place)
            error = case.error()
            seconds = timed(case.run, plan.device)
        except Exception as failure:
            correct = False
            report.row(spec.name, size, expected, f"FAILED {type(failure).__name__}: {failure}")
            continue
        finally:
            case = None
            if plan.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        right = error <= spec.bound
        correct &= right
        rate = f"{spec.n_flops / seconds / 1e12:.0f}" if spec.n_flops else ""
        report.row(
            *(spec.name, size, expected, f"{seconds * 1e6:.1f}"),
            *(f"{spec.n_bytes / seconds / bandwidth:.0%}", rate),
            f"{error:.1e}{'' if right else ' WRONG'}",
        )
    report.line(f"\n{'All kernels within bounds.' if correct else 'SOME KERNELS ARE WRONG.'}")
    return correct
