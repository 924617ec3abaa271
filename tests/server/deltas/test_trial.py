"""Terms are tried before they are served, each through the kernel that will serve it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.codecs.term import TensorDelta, Term
from server.deltas.experts import ExpertParameter, ExpertsProjection
from server.deltas.failures import TermsDiffer
from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.deltas.trial import VariantTrial, try_terms
from server.errors import DeltaBroken
from server.ops.blockdiag import BlockDiagOp
from server.ops.kernels import Kernels, TorchKernels
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import RowMapping, SlotSegments
from tests.server.conftest import PAIR, Served
from tests.server.deltas.pools.test_geometry import OPTIONS, encode_all
from tests.server.helpers import CoreHarness

SHAPE = (64, 48)
CASES = [(codec, options) for codec, several in OPTIONS.items() for options in several]


class WrongBlocks(TorchKernels):
    """Block-diagonal products and look-ups that come out a tenth too large."""

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        right = super().blockdiag(blocks)

        class Wrong:
            def add_(self, outputs: Any, x: Tensor, segments: SlotSegments) -> None:
                right.add_(outputs, x * 1.1, segments)

        return Wrong()  # type: ignore[return-value]

    def blockdiag_rows_add_(
        self, y: Tensor, ids: Tensor, places: Tensor, blocks: PackedBlocks
    ) -> None:
        super().blockdiag_rows_add_(y, ids, places, blocks)
        y *= 1.1


class Untidy(TorchKernels):
    """Products that reach into the rows of another."""

    def lowrank_add_(self, outputs: Any, x: Tensor, rows: RowMapping, terms: Any) -> None:
        super().lowrank_add_(outputs, x, rows, terms)
        outputs[0][0] += 1


def tried(codec: str, options: dict[str, object], kernels: Kernels, dtype: torch.dtype) -> None:
    """One parameter that a linear multiplies with and an embedding looks up: tied weights."""
    terms = encode_all(codec, options, SHAPE)[0]
    parameter = DeltaParameter("lm_head.weight", torch.zeros(SHAPE, dtype=dtype), kernels)
    parameter.is_multiplied = parameter.is_looked_up = True
    delta = TensorDelta("lm_head.weight", SHAPE, SHAPE, False, terms, None)
    try_terms(delta, parameter.stage(delta))
    assert not parameter.pools, "nothing is left of the trial"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("codec", "options"), CASES)
def test_try_terms_of_right_kernels_passes(
    codec: str, options: dict[str, object], dtype: torch.dtype
) -> None:
    tried(codec, options, TorchKernels(), dtype)


@pytest.mark.parametrize(
    ("codec", "options", "kernels"),
    [
        ("blockdiag", {"bits": 3}, WrongBlocks()),
        ("rows", {"bits": 3, "n_rows": 20}, WrongBlocks()),
        ("lowrank", {"bits": 16}, Untidy()),
    ],
)
def test_try_terms_of_a_wrong_kernel_names_the_parameter(
    codec: str, options: dict[str, object], kernels: Kernels
) -> None:
    with pytest.raises(TermsDiffer, match=f"^lm_head.weight: its {codec} terms give other values"):
        tried(codec, options, kernels, torch.float32)


def test_variant_trial_of_experts_tries_each_projection_and_geometry_once() -> None:
    base, kernels = torch.zeros(SHAPE), WrongBlocks()
    home = ExpertsProjection("mlp.up", base, 2, kernels, Residency(n_slots=1))
    one, two = (
        ExpertParameter(f"mlp.up[{e}]", base, home, e, turned=False, counted=True) for e in range(2)
    )
    right, wrong = (
        encode_all("lowrank", {"bits": 16}, SHAPE)[0],
        encode_all("blockdiag", {}, SHAPE)[0],
    )
    trial = VariantTrial()

    def tries(trial: VariantTrial, parameter: ExpertParameter, terms: tuple[Term, ...]) -> None:
        delta = TensorDelta(parameter.name, SHAPE, SHAPE, False, terms, None)
        trial(delta, parameter.stage(delta))

    tries(trial, one, right)
    with pytest.raises(TermsDiffer, match=r"^mlp.up\[1\]: its blockdiag terms"):
        tries(trial, two, wrong)
    one.kernels = Untidy()
    tries(trial, one, right)
    with pytest.raises(TermsDiffer, match=r"^mlp.up\[0\]: its lowrank terms"):
        tries(VariantTrial(), one, right)


def test_engine_with_a_wrong_kernel_fails_the_variant_and_serves_the_others(
    served: Any, harness: Any
) -> None:
    pair: Served = served("llama", PAIR)
    engine: CoreHarness = harness(pair, kernels=WrongBlocks())
    names = list(pair.checkpoints)
    sent = {name: engine.submit(name, [5, 6, 7], max_tokens=4) for name in names}
    engine.run(*sent.values())
    error = sent["blockdiag"].error
    assert isinstance(error, DeltaBroken)
    assert "weight: its blockdiag terms give other values on this device" in error.message
    for name in ("base", "impart"):
        assert sent[name].output_ids == pair.truth(name, [5, 6, 7])[:4]
    again = engine.submit("blockdiag", [5, 6, 7])
    engine.run(again)
    assert isinstance(again.error, DeltaBroken), "known, without reading it again"
