"""Kinds of x86 CPU that code can be made for on any other, by LLVM's names."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import llvmlite.binding as llvm

_V2 = ("cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_SKYLAKE = (*_V3, "aes", "pclmul", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_ICE_LAKE = (
    *_SKYLAKE, "avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512ifma", "avx512bitalg",
    "avx512vpopcntdq", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip
# What LLVM would use of a kind by its name alone and its rivals lack; of no matter for the kernels.
_OF_ONE_VENDOR = ("sse4a",)


@dataclass(frozen=True)
class Kind:
    """A CPU by LLVM's name, and the features it has that matter to code."""

    name: str
    features: tuple[str, ...]

    @property
    def runs_here(self) -> bool:
        return platform.machine() in ("x86_64", "AMD64") and _host() >= set(self.features)

    def environment(self) -> dict[str, str]:
        """A process's environment in which numba makes code for this kind."""
        named = [f"+{feature}" for feature in self.features]
        if self.runs_here:  # without what this host cannot execute
            named += [f"-{feature}" for feature in _OF_ONE_VENDOR if feature not in _host()]
        return os.environ | {"NUMBA_CPU_NAME": self.name, "NUMBA_CPU_FEATURES": ",".join(named)}


KINDS = (
    Kind("x86-64", ("sse2",)),
    Kind("x86-64-v2", _V2),
    Kind("x86-64-v3", _V3),
    Kind("haswell", (*_V3, "aes", "pclmul", "fsgsbase", "invpcid")),
    Kind("znver3", (*_V3, "adx", "aes", "pclmul", "sha", "vaes", "vpclmulqdq")),
    Kind("skylake-avx512", _SKYLAKE),
    Kind("znver4", (*_ICE_LAKE, "avx512bf16")),
    Kind(
        "sapphirerapids",
        (*_ICE_LAKE, "avx512bf16", "avx512fp16", "avxvnni", "amx-tile", "amx-int8", "amx-bf16"),
    ),
)


def kind(name: str) -> Kind:
    return next(one for one in KINDS if one.name == name)


def _host() -> set[str]:
    return {name for name, present in llvm.get_host_cpu_features().items() if present}
