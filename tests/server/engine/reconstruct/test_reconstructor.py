"""Merged weights that come and go under running requests: the tokens stay the oracle's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import torch

from server.engine.reconstruct.policy import Decision
from server.engine.step.batch import Batch
from server.metrics.series import Metrics
from tests.server.conftest import ALL_CODECS, PAIR, Served
from tests.server.engine.test_core import assert_true_text
from tests.server.engine.test_core_variants import intercept_reads
from tests.server.helpers import CoreHarness, Recorded

PROMPT = "The quick brown fox"
Make = Callable[..., CoreHarness]
BUDGET = {"reconstruct_budget_bytes": 1 << 30}


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


def order(engine: CoreHarness, promote: str | None = None, demote: tuple[str, ...] = ()) -> None:
    """Make the next decision this one, by names, and no other after it."""
    decisions = [
        Decision(tuple(key_of(engine, n) for n in demote), promote and key_of(engine, promote))
    ]
    engine.core.reconstructor.policy.decide = (  # type: ignore[method-assign]
        lambda now: decisions.pop() if decisions else Decision()
    )
    engine.core.reconstructor._next_decision = 0.0


def key_of(engine: CoreHarness, name: str) -> str:
    return engine.catalog.open(name).key


def intercept(engine: CoreHarness, before: Callable[[str], None]) -> None:
    """As `intercept_reads`, also for merging."""
    intercept_reads(engine, before)
    engine.core.reconstructor._job_for = engine.core._job_for


def is_merged(engine: CoreHarness, name: str) -> bool:
    return key_of(engine, name) in engine.core.stats().merged_bytes


def promoted(engine: CoreHarness, name: str) -> None:
    """Load the variant, let it run once, and merge it."""
    engine.run(engine.submit(name, "x", max_tokens=1))
    order(engine, promote=name)
    engine.until(lambda: is_merged(engine, name))


def merged_steps(engine: CoreHarness) -> list[int | None]:
    """The merged slot of every step from now on."""
    seen: list[int | None] = []
    inner = engine.core._runner.forward

    def forward(batch: Batch) -> torch.Tensor:
        seen.append(batch.merged_slot)
        return inner(batch)

    engine.core._runner.forward = forward  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", list(ALL_CODECS))
def test_merged_weights_give_the_oracles_tokens(
    served: Callable[..., Served], harness: Make, name: str
) -> None:
    many = served("llama", ALL_CODECS)
    engine = harness(many, **BUDGET)
    promoted(engine, name)
    steps = merged_steps(engine)
    sent = [engine.submit(name, text) for text in (PROMPT, "x", "What else")]
    engine.run(*sent)
    assert steps
    assert set(steps) == {0}
    assert_true_text(many, *sent)


def test_merged_weights_with_biases_and_added_tokens_give_the_oracles_tokens(
    served: Callable[..., Served], harness: Make
) -> None:
    qwen = served("qwen2", {"blockdiag": PAIR["blockdiag"]}, extra_vocab=3)
    engine = harness(qwen, **BUDGET)
    promoted(engine, "blockdiag")
    steps = merged_steps(engine)
    sent = engine.submit("blockdiag", PROMPT)
    engine.run(sent)
    assert set(steps) == {0}
    assert_true_text(qwen, sent)


def test_switch_in_mid_sequence_there_and_back_keeps_the_tokens(
    pair: Served, harness: Make
) -> None:
    engine = harness(pair, **BUDGET)
    engine.run(engine.submit("impart", "x", max_tokens=1))
    steps = merged_steps(engine)
    sent = engine.submit("impart", PROMPT)
    engine.until(lambda: sent.request.n_output >= 3)
    order(engine, promote="impart")
    at = len(steps)
    while not is_merged(engine, "impart"):  # the worker's time is not the engine's: hold still
        engine.core._take_commands()
        engine.core.reconstructor.tend()
    engine.until(lambda: sent.request.n_output >= 8)
    order(engine, demote=("impart",))
    engine.run(sent)
    assert set(steps[:at]) == {None}
    assert steps[at] == 0
    assert steps[-1] is None
    assert_true_text(pair, sent)
    # What was cached with one kind of weights continues with the other.
    again = engine.submit("impart", PROMPT)
    engine.run(again)
    assert_true_text(pair, again)


def test_mixed_steps_apply_deltas(pair: Served, harness: Make) -> None:
    engine = harness(pair, **BUDGET)
    promoted(engine, "blockdiag")
    engine.run(engine.submit("impart", "x", max_tokens=1))
    steps = merged_steps(engine)
    sent = [engine.submit(n, PROMPT) for n in ("base", "blockdiag", "impart", "blockdiag")]
    engine.run(*sent)
    assert steps[0] is None
    assert_true_text(pair, *sent)
    engine.assert_idle()


def test_steps_go_on_while_weights_are_being_merged(pair: Served, harness: Make) -> None:
    engine = harness(pair, **BUDGET)
    engine.run(engine.submit("impart", "x", max_tokens=1))
    may_read, threads = threading.Event(), []

    def before(name: str) -> None:
        threads.append(threading.current_thread().name)
        may_read.wait(60)

    intercept(engine, before)
    order(engine, promote="impart")
    sent = [engine.submit(n, PROMPT) for n in ("impart", "base")]
    engine.run(*sent)
    assert engine.core.reconstructor.policy.building == key_of(engine, "impart")
    assert not is_merged(engine, "impart")
    may_read.set()
    engine.until(lambda: is_merged(engine, "impart"))
    assert [name.startswith("merge") for name in threads] == [True]
    assert_true_text(pair, *sent)


def test_variant_evicted_while_being_merged_is_not_installed(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_resident_variants=1, **BUDGET)
    engine.run(engine.submit("impart", "x", max_tokens=1))
    may_read = threading.Event()
    intercept(engine, lambda name: name == "impart" and may_read.wait(60) and None)
    order(engine, promote="impart")
    engine.core.turn()
    assert engine.core.reconstructor.policy.building is not None
    other = engine.submit("blockdiag", PROMPT)
    engine.run(other)
    may_read.set()
    engine.until(lambda: engine.core.reconstructor.policy.building is None)
    assert engine.core.stats().merged_bytes == {}
    again = [engine.submit(n, PROMPT) for n in ("impart", "blockdiag")]
    engine.run(*again)
    assert_true_text(pair, other, *again)


def test_variant_evicted_while_merged_takes_its_weights_along(pair: Served, harness: Make) -> None:
    engine = harness(pair, max_resident_variants=1, **BUDGET)
    promoted(engine, "impart")
    steps = merged_steps(engine)
    other = engine.submit("blockdiag", PROMPT)  # into the same slot
    engine.run(other)
    assert set(steps) == {None}
    assert engine.core.stats().merged_bytes == {}
    assert all(not unit.merged for unit in engine.core.reconstructor._weights._units)
    assert_true_text(pair, other)


def test_merge_that_fails_is_told_and_the_deltas_go_on(
    pair: Served, harness: Make, caplog: pytest.LogCaptureFixture
) -> None:
    engine, metrics = harness(pair, **BUDGET), Metrics()
    engine.core.reconstructor._observer = metrics
    engine.run(engine.submit("impart", "x", max_tokens=1))

    def fail(name: str) -> None:
        raise MemoryError("no memory for a copy")

    intercept(engine, fail)
    order(engine, promote="impart")
    with caplog.at_level(logging.ERROR):
        engine.until(lambda: bool(caplog.records))
        engine.until(lambda: engine.core.reconstructor.policy.building is None)
    assert "merging the weights of impart failed" in caplog.text
    assert 'impart_reconstruct_failures_total{model_name="impart"} 1.0' in metrics.render().decode()
    sent: Recorded = engine.submit("impart", PROMPT)
    engine.run(sent)
    assert_true_text(pair, sent)


def test_promotions_and_demotions_are_counted(pair: Served, harness: Make) -> None:
    engine, metrics = harness(pair, **BUDGET), Metrics()
    engine.core.reconstructor._observer = metrics
    promoted(engine, "impart")
    order(engine, demote=("impart",))
    engine.core.turn()
    text = metrics.render().decode()
    assert 'impart_reconstruct_promotions_total{model_name="impart"} 1.0' in text
    assert 'impart_reconstruct_demotions_total{model_name="impart"} 1.0' in text


def test_traffic_of_one_variant_promotes_it_without_orders(
    pair: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.reconstruct.policy.WINDOW_S", 0.2)
    monkeypatch.setattr("server.engine.reconstruct.reconstructor.DECIDE_S", 0.0)
    engine = harness(pair, max_num_seqs=4, **BUDGET)
    sent = [engine.submit("impart", PROMPT)]

    def hot() -> bool:
        if sent[-1].done:
            sent.append(engine.submit("impart", PROMPT))
        return is_merged(engine, "impart")

    engine.until(hot)
    assert engine.core.stats().merged_bytes[key_of(engine, "impart")] > 0
    engine.run(*sent)
    assert_true_text(pair, *sent)
