"""Every kernel made for many kinds of CPU, in a process for each, and run where it can be."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from server.ops.cpu.check import NAMES, try_kernels, wanted_kernels
from server.ops.cpu.features import Target
from tests.server.ops.cpu.kinds import KINDS, Kind, kind

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="code for x86 cannot be made here"
)
MAKE = (
    "import sys; from server.ops.cpu.kernels import NumbaKernels; "
    "print(sorted(NumbaKernels(usable=set(sys.argv[1:])).in_use))"
)


def wanted(one: Kind) -> tuple[str, ...]:
    return wanted_kernels(Target("x86_64", one.name, frozenset(one.features)))


def check(one: Kind, names: tuple[str, ...]) -> None:
    if one.runs_here:
        verdicts = try_kernels(names, environment=one.environment())
        assert verdicts == dict.fromkeys(names)
        return
    done = subprocess.run(
        [sys.executable, "-c", MAKE, *names],
        env=one.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(sorted(names))


@pytest.mark.parametrize("one", KINDS, ids=lambda one: one.name)
def test_kernels_for_any_kind_are_made_and_equal_float64(one: Kind) -> None:
    check(one, wanted(one))


@pytest.mark.slow
@pytest.mark.parametrize("one", KINDS, ids=lambda one: one.name)
def test_linear_for_any_kind_is_made_and_equals_float64(one: Kind) -> None:
    """Also where the server does not use it: its tests make it on every machine."""
    check(one, ("linear",))


def test_linear_is_wanted_only_where_bfloat16_pairs_are_multiplied_and_no_matrices() -> None:
    assert [one.name for one in KINDS if "linear" in wanted(one)] == ["znver4"]
    assert all(set(wanted(one)) >= set(NAMES) - {"linear", "widened"} for one in KINDS)


def test_widened_is_wanted_only_where_no_unit_multiplies_bfloat16() -> None:
    without = [one.name for one in KINDS if not set(one.features) & {"avx512bf16", "amx-bf16"}]
    assert without
    assert [one.name for one in KINDS if "widened" in wanted(one)] == without


def test_kind_without_the_kernel_fails() -> None:
    """Else the tests here could pass without any."""
    verdicts = try_kernels(["nonsense"], environment=kind("x86-64").environment())
    assert verdicts == {"nonsense": "is unknown"}
