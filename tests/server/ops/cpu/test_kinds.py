"""Every kernel made for many kinds of CPU, in a process for each, and run where it can be."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from server.ops.cpu import features
from server.ops.cpu.check import NAMES, try_kernels, wanted_kernels
from server.ops.cpu.features import Form, Target
from server.ops.cpu.linear import LinearKernel
from server.ops.cpu.widened import WidenedKernel
from tests.server.ops.cpu import forms
from tests.server.ops.cpu.kinds import KINDS, Kind, kind

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="code for x86 cannot be made here"
)
FEW = ("rows", "prefill", "rotary")  # compiled in seconds; the others take half a minute
MAKE = (
    "import sys; from server.ops.cpu.kernels import NumbaKernels; "
    "print(sorted(NumbaKernels(usable=set(sys.argv[1:])).in_use))"
)


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


def wanted_words() -> dict[str, np.ndarray]:
    """What every form gives, by torch and float64."""
    words = forms.inputs()
    a, b = (array.view(np.float32) for array in words[:2])
    halves = (words[0] & 0x8BFF).astype(np.uint16)
    high = (words[0] & 0xFFFF0000).view(np.float32).astype(np.float64)
    fields = [np.array(forms.FIELD_VALUES)[(words[0] >> shift) & 3] for shift in (0, 16)]
    return {
        "MULTIPLY_ADDS": a.astype(np.float64) ** 2 + b,
        "ROUNDINGS": torch.from_numpy(b).bfloat16().double().numpy(),
        "HALVES": halves.view(np.float16).astype(np.float64),
        "PAIR_PRODUCTS": a + 2 * high**2,
        "LOOK_UPS": np.concatenate(fields),
        "SIXTEEN": np.array(forms.TABLE)[words[2]],
    }


def read_words(name: str, words: list[int]) -> np.ndarray:
    found = np.array(words, np.uint32)
    if name == "ROUNDINGS":
        return (found << 16).view(np.float32)
    if name == "LOOK_UPS":
        return np.concatenate([found << 16, found & 0xFFFF0000]).view(np.float32)
    return found.view(np.float32)


@pytest.mark.parametrize("one", KINDS, ids=lambda one: one.name)
def test_forms_for_any_kind_are_made_and_equal_float64(one: Kind) -> None:
    """What the kinds differ by; the kernels around it are the same code for all."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.ops.cpu.forms", *["run"] * one.runs_here],
        env=one.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.keys() == wanted_words().keys()
    for name, want in wanted_words().items():
        if one.runs_here:
            np.testing.assert_allclose(read_words(name, found[name]), want, rtol=1e-6, atol=1e-6)


def test_every_table_of_forms_is_tried() -> None:
    folder = Path(features.__file__).parent / "codegen"
    modules = [f"server.ops.cpu.codegen.{path.stem}" for path in folder.glob("[!_]*.py")]
    tables = {
        name
        for module in map(importlib.import_module, modules)
        for name, value in vars(module).items()
        if isinstance(value, tuple) and value and isinstance(value[0], Form)
    }
    assert tables == forms.FORMS.keys()


@pytest.mark.parametrize(
    ("one", "names"),
    [
        pytest.param(kind("x86-64"), FEW, id="x86-64-few"),
        *(pytest.param(one, NAMES, id=one.name, marks=pytest.mark.slow) for one in KINDS),
    ],
)
def test_kernels_for_any_kind_are_made_and_equal_float64(one: Kind, names: tuple[str, ...]) -> None:
    check(one, names)


def test_linear_is_wanted_only_where_units_multiply_bfloat16() -> None:
    targets = [Target("x86_64", one.name, frozenset(one.features)) for one in KINDS]
    assert [one.name for one in targets if "linear" in wanted_kernels(one)] == [
        one.name for one in targets if one.has_bf16_products
    ]
    assert all(set(wanted_kernels(one)) >= set(NAMES) - {"linear"} for one in targets)


def test_base_products_in_panels_pay_only_where_pairs_are_multiplied_and_no_matrices() -> None:
    targets = [Target("x86_64", one.name, frozenset(one.features)) for one in KINDS]
    assert [one.name for one in targets if LinearKernel.pays_on(one)] == ["znver4"]


def test_base_products_in_float32_pay_only_where_no_unit_multiplies_bfloat16() -> None:
    targets = [Target("x86_64", one.name, frozenset(one.features)) for one in KINDS]
    without = [one.name for one in KINDS if not set(one.features) & {"avx512bf16", "amx-bf16"}]
    assert without
    assert [one.name for one in targets if WidenedKernel.pays_on(one)] == without


def test_kind_without_the_kernel_fails() -> None:
    """Else the tests here could pass without any."""
    verdicts = try_kernels(["nonsense"], environment=kind("x86-64").environment())
    assert verdicts == {"nonsense": "is unknown"}
