"""What the CPU has that code is made for, and which form of an operation that means.

This is the only place that asks. It reads numba's own target, so that ``NUMBA_CPU_NAME`` and
``NUMBA_CPU_FEATURES`` count. What an operation needs is said beside it: `Form.needs`, by LLVM's
names of features. An instruction of one vendor stands only in a form that needs its feature; the
last form of an operation needs nothing and is made of plain vectors, which LLVM lowers for any CPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numba.core.registry import cpu_target

# Vector units as people call them, the best first, and the feature that tells.
_UNITS = (
    ("AVX-512", "avx512f"),
    ("AVX2", "avx2"),
    ("AVX", "avx"),
    ("SSE4.2", "sse4.2"),
    ("SSE2", "sse2"),
    ("SVE", "sve"),
    ("NEON", "neon"),
)
# Units that multiply bfloat16 and that torch's products use: x86's vectors and matrices, Arm's.
_BF16_UNITS = ("avx512bf16", "amx-bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Target:
    """The machine that code is made for; `name` and `features` as LLVM calls them."""

    triple: str
    name: str
    features: frozenset[str]

    def has(self, needs: Sequence[str]) -> bool:
        """Whether all of these features are there."""
        return self.features.issuperset(needs)

    @property
    def has_bf16_products(self) -> bool:
        """Whether torch multiplies bfloat16 at least as fast as float32 here."""
        # torch on macOS multiplies through Accelerate, which widens bfloat16 first.
        return sys.platform != "darwin" and not self.features.isdisjoint(_BF16_UNITS)

    def __str__(self) -> str:
        units = next((name for name, feature in _UNITS if feature in self.features), "no vectors")
        bf16 = "bfloat16 units" if self.has_bf16_products else "no bfloat16 units"
        return f"{self.name} ({units}, {bf16})"


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write an operation as LLVM code, and the features it needs."""

    write: Callable[..., Any]
    needs: tuple[str, ...] = ()


def host_target() -> Target:
    """What numba makes code for in this process."""
    return target_of(cpu_target.target_context)


def target_of(context: Any) -> Target:
    """What a numba context makes code for."""
    return _read(context.codegen())


@functools.cache
def _read(codegen: Any) -> Target:
    triple, name, features = codegen.magic_tuple()
    present = (item[1:] for item in features.split(",") if item.startswith("+"))
    return Target(triple, name, frozenset(present))


def chosen(context: Any, forms: Sequence[Form]) -> Callable[..., Any]:
    """The first form whose needs the context's target has."""
    target = target_of(context)
    return next(form.write for form in forms if target.has(form.needs))
