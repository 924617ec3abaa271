"""Every kernel: time, share of the copy bandwidth, deviation from float64, and the prediction."""

from __future__ import annotations

import gc
from contextlib import suppress

import torch

from benchmarks.gpu.cases import Spec
from benchmarks.gpu.predict import kernel_seconds
from benchmarks.gpu.report import Report
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.specs import spec_parts
from benchmarks.gpu.timing import copy_bandwidth, timed

COLUMNS = ("kernel", "MB", "expected us", "us", "of copy", "TFLOP/s", "off float64 by")


def parts(scope: Scope) -> list[str]:
    """What `kernels` takes. Each has a process of its own: an illegal address ends one only."""
    return list(spec_parts(scope.shape, scope.codecs, scope.sizes))


def kernels(scope: Scope, report: Report, part: str) -> bool:
    """Whether every kernel of a part runs and is within its bound. One that fails does not stop the
    rest, as long as the device still answers.
    """
    bandwidth = copy_bandwidth(scope)
    report.table(f"Kernels, one layer's launches: {part}", *COLUMNS)
    correct = True
    for spec in spec_parts(scope.shape, scope.codecs, scope.sizes)[part]:
        try:
            correct &= measure(spec, scope, report, part, bandwidth)
        except Exception as failure:
            correct = False
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
            report.row(spec.name, *_predicted(spec), f"FAILED {reason}")
        if not released(scope.device):
            report.line("\nTHE DEVICE NO LONGER ANSWERS: the rest of this part is left out")
            return False
    report.line(f"\n{'All kernels within bounds.' if correct else 'SOME KERNELS ARE WRONG.'}")
    return correct


def measure(spec: Spec, scope: Scope, report: Report, part: str, bandwidth: float) -> bool:
    """One row; whether the kernel is within its bound."""
    case = spec.make(scope.place)
    error = case.error()
    seconds = timed(case.run, scope.device)
    right = error <= spec.bound
    rate = f"{spec.n_flops / seconds / 1e12:.0f}" if spec.n_flops else ""
    share = spec.n_bytes / seconds / bandwidth
    report.row(
        spec.name,
        *_predicted(spec),
        f"{seconds * 1e6:.1f}",
        f"{share:.0%}",
        rate,
        f"{error:.1e}{'' if right else ' WRONG'}",
    )
    report.fact(
        "kernel",
        **{"name": spec.name, "part": part, "variants": spec.variants, "n_bytes": spec.n_bytes},
        **{"seconds": seconds, "expected_s": kernel_seconds(spec), "bandwidth": bandwidth},
    )
    return right


def _predicted(spec: Spec) -> tuple[str, str]:
    return f"{spec.n_bytes / 1e6:.2f}", f"{kernel_seconds(spec) * 1e6:.1f}"


def released(device: torch.device) -> bool:
    """Free what a case has left; False if the device has failed for good (an illegal address)."""
    if device.type != "cuda":
        return True
    with suppress(Exception):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        return True
    return False
