"""Every model is exact or refused: compressed, reconstructed, served alone and mixed."""

from __future__ import annotations

import pytest

from compressor.compress.options import Options
from tests.models.cases import all_cases
from tests.models.known import KNOWN
from tests.models.outcome import EXACT, Row
from tests.models.run import run_apart, run_case

# One of every kind: plain; window and cap; tied, stored [in, out], with added rows; experts; keys
# wider than values; state beside attention; a tower for images; ALiBi, and no attention interface.
FEW = (
    "llama",
    "gemma2",
    "gpt2-added-rows",
    "mixtral",
    "deepseek_v3-dense",
    "mamba",
    "llava",
    "bloom",
)
SERVED = tuple(name for name in FEW if name != "mamba")
AUTO = ("llama", "gemma2", "gpt2-added-rows", "mixtral")


def unexpected(row: Row) -> dict[str, str]:
    """Cells that are neither right nor a known fault, and known faults that are there no more."""
    known = {cell for name, cell in KNOWN if name == row.name}
    faults = row.faults()
    new = {cell: f"{faults[cell].state}: {faults[cell].text}" for cell in faults.keys() - known}
    return new | dict.fromkeys(known - faults.keys(), "mended: take it out of KNOWN")


@pytest.mark.parametrize("name", FEW)
def test_model_of_each_kind_is_exact_or_refused(name: str) -> None:
    row = run_case(name, kernels=("torch", "numba"))
    assert unexpected(row) == {}
    if name in SERVED:
        assert set(row.cells().values()) == {EXACT}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_cases())
def test_every_model_is_exact_or_refused(name: str) -> None:
    (row,) = run_apart([name])
    assert unexpected(row) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTO)
def test_model_compressed_with_auto_is_exact_or_refused(name: str) -> None:
    (row,) = run_apart([name], options=Options(codec="auto"))
    assert row.faults() == {}


def test_known_faults_name_cases_and_cells() -> None:
    assert all(name in all_cases() and cell in Row("").cells() for name, cell in KNOWN)
