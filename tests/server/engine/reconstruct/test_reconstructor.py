"""Reconstructed weights that come and go under running requests: the tokens stay the oracle's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine.reconstruct.policy import Decision
from server.engine.reconstruct.reconstructor import BuildEnded
from server.engine.step.batch import Batch
from server.engine.step.runner import DecodeStep
from server.metrics.series import Metrics
from server.model.linear import DeltaLinear, Product
from server.model.reconstructed import NOBODY
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


def hot(harness: Make, served: Served, **settings: Any) -> CoreHarness:
    """An engine with a budget that decides nothing by itself, however slow its steps are."""
    engine = harness(served, **BUDGET, **settings)
    order(engine)
    return engine


def key_of(engine: CoreHarness, name: str) -> str:
    return engine.catalog.open(name).key


def intercept(engine: CoreHarness, before: Callable[[str], None]) -> None:
    """As `intercept_reads`, also for builds."""
    intercept_reads(engine, before)
    engine.core.reconstructor._job_for = engine.core._job_for


def is_reconstructed(engine: CoreHarness, name: str) -> bool:
    return key_of(engine, name) in engine.core.stats().reconstructed_bytes


def promoted(engine: CoreHarness, name: str) -> None:
    """Load the variant, let it run once, and reconstruct it."""
    engine.run(engine.submit(name, "x", max_tokens=1))
    order(engine, promote=name)
    engine.until(lambda: is_reconstructed(engine, name))


def units(engine: CoreHarness) -> list[Product]:
    """Every product of the base."""
    modules = engine.core._runner.base.model.modules()
    return [module.product for module in modules if isinstance(module, DeltaLinear)]


def builds_ended(engine: CoreHarness) -> list[BuildEnded]:
    """What the engine hears of builds from now on."""
    heard: list[BuildEnded] = []
    inner = engine.core.reconstructor.on_message

    def on_message(message: BuildEnded) -> None:
        inner(message)
        heard.append(message)

    engine.core.reconstructor.on_message = on_message  # type: ignore[method-assign]
    return heard


def reconstructed_in_steps(engine: CoreHarness) -> list[frozenset[int]]:
    """Slots whose reconstructed weights are used, of every step from now on."""
    seen: list[frozenset[int]] = []
    inner = engine.core._runner.forward

    def forward(step: Batch | DecodeStep) -> torch.Tensor:
        seen.append(step.reconstructed if isinstance(step, Batch) else NOBODY)
        return inner(step)

    engine.core._runner.forward = forward  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", list(ALL_CODECS))
def test_reconstructed_weights_give_the_oracles_tokens(
    served: Callable[..., Served], harness: Make, name: str
) -> None:
    many = served("llama", ALL_CODECS)
    engine = hot(harness, many)
    promoted(engine, name)
    steps = reconstructed_in_steps(engine)
    sent = [engine.submit(name, text) for text in (PROMPT, "x", "What else")]
    engine.run(*sent)
    assert steps
    assert set(steps) == {frozenset({0})}
    assert_true_text(many, *sent)


def test_reconstructed_weights_with_biases_and_added_tokens_give_the_oracles_tokens(
    served: Callable[..., Served], harness: Make
) -> None:
    qwen = served("qwen2", {"blockdiag": PAIR["blockdiag"]}, extra_vocab=3)
    engine = hot(harness, qwen)
    promoted(engine, "blockdiag")
    steps = reconstructed_in_steps(engine)
    sent = engine.submit("blockdiag", PROMPT)
    engine.run(sent)
    assert set(steps) == {frozenset({0})}
    assert_true_text(qwen, sent)


def test_switch_in_mid_sequence_there_and_back_keeps_the_tokens(
    pair: Served, harness: Make
) -> None:
    engine = hot(harness, pair)
    engine.run(engine.submit("impart", "x", max_tokens=1))
    steps = reconstructed_in_steps(engine)
    sent = engine.submit("impart", PROMPT)
    engine.until(lambda: sent.request.n_output >= 3)
    order(engine, promote="impart")
    at = len(steps)
    while not is_reconstructed(
        engine, "impart"
    ):  # the worker's time is not the engine's: hold still
        engine.core._take_commands()
        engine.core.reconstructor.tend()
    engine.until(lambda: sent.request.n_output >= 8)
    order(engine, demote=("impart",))
    engine.run(sent)
    assert set(steps[:at]) == {NOBODY}
    assert steps[at] == {0}
    assert steps[-1] == NOBODY
    assert_true_text(pair, sent)
    # What was cached with one kind of weights continues with the other.
    again = engine.submit("impart", PROMPT)
    engine.run(again)
    assert_true_text(pair, again)


def test_mixed_steps_apply_deltas(pair: Served, harness: Make) -> None:
    engine = hot(harness, pair)
    promoted(engine, "blockdiag")
    engine.run(engine.submit("impart", "x", max_tokens=1))
    steps = reconstructed_in_steps(engine)
    sent = [engine.submit(n, PROMPT) for n in ("base", "blockdiag", "impart", "blockdiag")]
    engine.run(*sent)
    assert steps[0] == NOBODY
    assert_true_text(pair, *sent)
    engine.assert_idle()


def test_steps_go_on_while_weights_are_being_built(pair: Served, harness: Make) -> None:
    engine = hot(harness, pair)
    engine.run(engine.submit("impart", "x", max_tokens=1))
    may_read, threads = threading.Event(), []

    def before(name: str) -> None:
        threads.append(threading.current_thread().name)
        may_read.wait(60)

    intercept(engine, before)
    order(engine, promote="impart")
    sent = [engine.submit(n, PROMPT) for n in ("impart", "base")]
    engine.run(*sent)
    assert not is_reconstructed(engine, "impart")
    may_read.set()
    engine.until(lambda: is_reconstructed(engine, "impart"))
    assert [name.startswith("reconstruct") for name in threads] == [True]
    assert_true_text(pair, *sent)


def test_variant_evicted_while_being_built_is_not_installed(pair: Served, harness: Make) -> None:
    engine = hot(harness, pair, max_resident_variants=1)
    engine.run(engine.submit("impart", "x", max_tokens=1))
    may_read = threading.Event()
    intercept(engine, lambda name: name == "impart" and may_read.wait(60) and None)
    order(engine, promote="impart")
    engine.core.turn()
    heard = builds_ended(engine)
    other = engine.submit("blockdiag", PROMPT)
    engine.run(other)
    may_read.set()
    engine.until(lambda: bool(heard))
    assert heard[0].ops is None
    assert engine.core.stats().reconstructed_bytes == {}
    again = [engine.submit(n, PROMPT) for n in ("impart", "blockdiag")]
    engine.run(*again)
    assert_true_text(pair, other, *again)


def test_variant_evicted_while_reconstructed_takes_its_weights_along(
    pair: Served, harness: Make
) -> None:
    engine = hot(harness, pair, max_resident_variants=1)
    promoted(engine, "impart")
    steps = reconstructed_in_steps(engine)
    other = engine.submit("blockdiag", PROMPT)  # into the same slot
    engine.run(other)
    assert set(steps) == {NOBODY}
    assert engine.core.stats().reconstructed_bytes == {}
    assert all(not unit.reconstructed for unit in units(engine))
    assert_true_text(pair, other)


def test_reconstruction_that_fails_is_told_and_the_deltas_go_on(
    pair: Served, harness: Make, caplog: pytest.LogCaptureFixture
) -> None:
    engine, metrics = hot(harness, pair), Metrics()
    engine.core.reconstructor._observer = metrics
    engine.run(engine.submit("impart", "x", max_tokens=1))

    def fail(name: str) -> None:
        raise MemoryError("no memory for a copy")

    intercept(engine, fail)
    heard = builds_ended(engine)
    order(engine, promote="impart")
    with caplog.at_level(logging.ERROR):
        engine.until(lambda: bool(heard))
    assert "reconstructing the weights of impart failed" in caplog.text
    assert 'impart_reconstruct_failures_total{model_name="impart"} 1.0' in metrics.render().decode()
    sent: Recorded = engine.submit("impart", PROMPT)
    engine.run(sent)
    assert_true_text(pair, sent)


def test_promotions_and_demotions_are_counted(pair: Served, harness: Make) -> None:
    engine, metrics = hot(harness, pair), Metrics()
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
        return is_reconstructed(engine, "impart")

    engine.until(hot)
    assert engine.core.stats().reconstructed_bytes[key_of(engine, "impart")] > 0
    engine.run(*sent)
    assert_true_text(pair, *sent)


def test_budget_and_steps_in_flight_work_together(pair: Served, harness: Make) -> None:
    """A stream whose every step is launched ahead: its weights are promoted under it and used."""
    engine = hot(harness, pair, static=True, kernels="torch", max_num_seqs=4)
    promoted(engine, "blockdiag")
    order(engine, demote=("blockdiag",))
    steps, ahead = reconstructed_in_steps(engine), []
    sent = engine.submit("impart", PROMPT, max_tokens=20, ignore_eos=True)

    def note_flight() -> bool:
        ahead.append(engine.core._lookahead.in_flight is not None)
        return sent.request.n_output >= 4

    engine.until(note_flight)
    assert ahead[-1], "asynchronous scheduling is on beside the budget"
    order(engine, promote="impart")
    at = len(steps)
    while not is_reconstructed(engine, "impart"):
        engine.core._take_commands()
        engine.core.reconstructor.tend()
    engine.run(sent)
    slot = engine.core.stats().resident[key_of(engine, "impart")].index
    assert set(steps[:at]) == {NOBODY}
    assert steps[-1] == {slot}
    assert sent.output_ids == long_truth(pair, "impart", sent.request.prompt_ids, 20)
    engine.assert_idle()


def test_steps_in_flight_count_for_the_policy(pair: Served, harness: Make) -> None:
    engine = hot(harness, pair, static=True, kernels="torch", max_num_seqs=4)
    told: list[str | None] = []
    inner = engine.core.reconstructor.policy.ran

    def ran(key: str | None, seconds: float, now: float) -> None:
        told.append(key)
        inner(key, seconds, now)

    engine.core.reconstructor.policy.ran = ran  # type: ignore[method-assign]
    sent = engine.submit("impart", PROMPT, max_tokens=8, ignore_eos=True)
    engine.run(sent)
    assert told.count(key_of(engine, "impart")) == 8
    assert engine.core.stats().n_static_steps > 0


def long_truth(pair: Served, name: str, prompt: list[int], n_tokens: int) -> list[int]:
    """What `generate` continues greedily, end tokens or not."""
    out = pair.oracle(name).generate(
        torch.tensor([prompt]),
        do_sample=False,
        min_new_tokens=n_tokens,
        max_new_tokens=n_tokens,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return out[0].tolist()[len(prompt) :]
