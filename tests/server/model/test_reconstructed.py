"""Variants of mode `reconstruct`: their weights, and what they share with promoted ones."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from compressor.artifact.reader import Artifact, read_artifact
from compressor.codecs import TensorDelta, lowrank_from_factors
from server.deltas.failures import Overflow
from server.deltas.parameter import DeltaParameter
from server.errors import DeltaUnusable
from server.model.reconstructed import ReconstructedOps, ReconstructStopped, _reconstruct
from server.ops.kernels import TorchKernels
from tests.server.conftest import ALL_CODECS, PAIR, Served
from tests.server.engine.reconstruct.test_reconstructor import (
    hot,
    key_of,
    promoted,
    reconstructed_in_steps,
    units,
)
from tests.server.engine.test_core import assert_true_text
from tests.server.helpers import CoreHarness

PROMPT = "The quick brown fox"
Make = Callable[..., CoreHarness]


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


@pytest.mark.parametrize("name", list(ALL_CODECS))
def test_mode_and_promotion_use_the_same_weights(
    served: Callable[..., Served], harness: Make, name: str
) -> None:
    many = served("llama", ALL_CODECS)
    by_mode, promoting = harness(many, mode="reconstruct"), hot(harness, many)
    by_mode.run(by_mode.submit(name, "x", max_tokens=1))
    promoted(promoting, name)
    pairs = list(zip(units(by_mode), units(promoting), strict=True))
    assert any(mine.reconstructed for mine, _ in pairs)
    for mine, other in pairs:
        assert mine.reconstructed.keys() == other.reconstructed.keys()
        for slot, op in mine.reconstructed.items():
            assert torch.equal(op.dense(), other.reconstructed[slot].dense())


def test_variants_of_both_modes_share_steps(pair: Served, harness: Make) -> None:
    engine = harness(pair, mode_overrides={"impart": "reconstruct"})
    steps = reconstructed_in_steps(engine)
    engine.run(engine.submit("impart", "x", max_tokens=1))
    sent = [engine.submit(n, PROMPT) for n in ("base", "impart", "blockdiag", "impart")]
    engine.run(*sent)
    slot = engine.core.stats().resident[key_of(engine, "impart")].index
    assert {slot} in steps[1:]
    assert_true_text(pair, *sent)
    engine.assert_idle()


def test_mode_whose_build_fails_fails_its_requests_only(pair: Served, harness: Make) -> None:
    engine = harness(pair, mode_overrides={"impart": "reconstruct"})

    def fail(artifact: object) -> None:
        raise MemoryError("no memory for a copy")

    engine.core.loader._weights.build = fail  # type: ignore[method-assign, assignment]
    other = engine.submit("blockdiag", PROMPT)
    sent = engine.submit("impart", PROMPT)
    engine.run(sent, other)
    assert isinstance(sent.error, DeltaUnusable)
    assert_true_text(pair, other)
    assert key_of(engine, "impart") not in engine.core.stats().resident


def test_mode_builds_beside_the_copies_of_others(pair: Served, harness: Make) -> None:
    """A build takes long; who is loaded meanwhile does not wait for it."""
    engine = harness(pair, mode_overrides={"impart": "reconstruct"})
    begun, may_build = threading.Event(), threading.Event()
    inner = engine.core.loader._weights.build

    def build(artifact: Artifact) -> ReconstructedOps:
        begun.set()
        may_build.wait(60)
        return inner(artifact)

    engine.core.loader._weights.build = build  # type: ignore[method-assign]
    sent = engine.submit("impart", PROMPT)
    engine.until(begun.is_set)
    other = engine.submit("blockdiag", PROMPT)
    engine.run(other)
    assert not sent.output_ids
    may_build.set()
    engine.run(sent)
    assert_true_text(pair, sent, other)


def test_build_reconstructs_what_the_checkpoint_holds(pair: Served, harness: Make) -> None:
    """Against the checkpoint that the compressor itself reconstructs, fused products row by row."""
    engine = harness(pair)
    weights = engine.core._runner.reconstructed
    artifact = read_artifact(pair.deltas / "impart")
    ops = weights.build(artifact)
    n_bytes = sum(op.dense().numel() * op.dense().element_size() for op in ops.values())
    assert weights.bytes_for(artifact) == n_bytes <= weights.n_bytes
    truth = pair.oracle("impart").state_dict()
    for unit, op in ops.items():
        want = torch.cat([truth[parameter.name] for parameter in unit.parameters_in_order])
        torch.testing.assert_close(op.dense(), want, rtol=0, atol=1e-6)


def test_build_that_may_not_go_on_stops(pair: Served, harness: Make) -> None:
    weights = harness(pair).core._runner.reconstructed
    with pytest.raises(ReconstructStopped):
        weights.build(read_artifact(pair.deltas / "impart"), lambda: False)


def test_used_in_by_mode_always_by_promotion_alone(pair: Served, harness: Make) -> None:
    weights = harness(pair).core._runner.reconstructed
    weights.install(1, {}, always=True)
    weights.install(2, {}, always=False)
    assert weights.used_in({-1, 0}) == set()
    assert weights.used_in({1}) == weights.used_in({-1, 1, 2}) == {1}
    assert weights.used_in({2}) == {2}
    assert weights.used_in({-1, 2}) == set()
    weights.remove(1)
    weights.remove(2)
    assert weights.used_in({1}) == weights.used_in({2}) == set()


def test_evicted_variant_of_mode_reconstruct_takes_its_weights_along(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, max_resident_variants=1, mode_overrides={"impart": "reconstruct"})
    engine.run(engine.submit("impart", "x", max_tokens=1))
    assert any(unit.reconstructed for unit in units(engine))
    other = engine.submit("blockdiag", PROMPT)  # into the same slot
    engine.run(other)
    assert not any(unit.reconstructed for unit in units(engine))
    assert_true_text(pair, other)


def test_sum_that_float16_cannot_hold_is_refused() -> None:
    """Neither the base nor the delta is too large by itself."""
    base = torch.full((2, 3), 6e4)
    parameter = DeltaParameter("x", base.half(), TorchKernels())
    term = lowrank_from_factors(torch.ones(1, 3), torch.full((1, 2), 1e4), 32)
    delta = TensorDelta("x", (2, 3), (2, 3), False, (term,), None)
    with pytest.raises(Overflow, match="x: a value of it is beyond 65504"):
        _reconstruct([parameter], {parameter: delta})
