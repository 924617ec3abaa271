"""The number format that a model's products run in, where the user leaves it to the server.

Many CPUs multiply bfloat16 several times slower than float32: they have no units for it, and torch
converts every operand. There the weights are widened, which changes none of their values, if they
fit. The choice is no matter of timing, so that a machine always gives the same answers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

import torch


@dataclass(frozen=True, slots=True)
class Cpu:
    """What is to be known of a CPU here: how people call it, and its bfloat16."""

    description: str
    has_bf16_products: bool


@dataclass(frozen=True, slots=True)
class Precision:
    """The chosen format, and a warning for whom it disappoints."""

    dtype: torch.dtype
    warning: str | None = None


def host_cpu() -> Cpu:
    """What is known of this machine's, read by numba where that is installed."""
    if find_spec("numba") is None:
        fast = sys.platform != "darwin" and torch.cpu._is_avx512_bf16_supported()
        name = torch.backends.cpu.get_cpu_capability()
        return Cpu(f"{name} ({'' if fast else 'no '}bfloat16 units)", fast)
    from server.ops.cpu.features import host_target

    target = host_target()
    return Cpu(str(target), target.has_bf16_products)


def cpu_precision(stored: torch.dtype, n_weights: int, budget_bytes: int, cpu: Cpu) -> Precision:
    """The format for weights that are `stored` in one of torch's, on this CPU.

    budget_bytes: the most that widened weights may take.
    """
    slow = stored is torch.float16 or (stored is torch.bfloat16 and not cpu.has_bf16_products)
    if not slow:
        return Precision(stored)
    n_bytes = 4 * n_weights
    if n_bytes <= budget_bytes:
        return Precision(torch.float32)
    return Precision(
        stored,
        f"products in {name_of(stored)} are slow on this CPU, but the weights would take "
        f"{gigabytes(n_bytes)} in float32 and may take {gigabytes(budget_bytes)}; raise "
        "--widened-weights-bytes, or choose with --dtype",
    )


def name_of(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def gigabytes(n_bytes: int) -> str:
    """For people, with three digits."""
    return f"{n_bytes / 1e9:.3g} GB"
