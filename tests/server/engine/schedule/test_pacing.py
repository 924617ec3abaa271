"""The step cost model and the prefill it allows beside running streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.schedule.pacing import (
    MIN_CHUNK_TOKENS,
    MIN_PREFILL_TOKENS,
    Allowance,
    PrefillPacer,
    StepCost,
    StepLoad,
)

TRUE = (0.03, 0.002, 1e-6, 0.0015, 1e-6)  # seconds per step, decode, context, token, pair


def true_seconds(load: StepLoad) -> float:
    return (
        TRUE[0]
        + TRUE[1] * load.n_decode
        + TRUE[2] * load.decode_context
        + TRUE[3] * load.n_prefill
        + TRUE[4] * load.prefill_pairs
    )


def some_load(rng: np.random.Generator, prefill: bool) -> StepLoad:
    n = int(rng.integers(0 if prefill else 1, 33))
    load = StepLoad(n, n * int(rng.integers(10, 2000)))
    if prefill:
        load = load.with_chunk(int(rng.integers(0, 2000)), int(rng.integers(2, 256)))
    return load


def learned(n_steps: int = 300, noise: float = 0.05) -> StepCost:
    rng, cost = np.random.default_rng(0), StepCost()
    for i in range(n_steps):
        load = some_load(rng, prefill=i % 2 == 0)
        cost.learn(load, true_seconds(load) * float(rng.lognormal(0, noise)))
    return cost


def test_with_chunk_counts_every_pair() -> None:
    by_hand = sum(7 + i + 0.5 for i in range(5))  # half of the diagonal, as a causal kernel does
    assert StepLoad().with_chunk(7, 5) == StepLoad(0, 0, 5, by_hand)


def test_seconds_before_any_step_is_nothing() -> None:
    assert StepCost().seconds(StepLoad(3, 100, 20, 50.0)) == 0


def test_learn_noisy_steps_predicts_unseen_loads() -> None:
    cost, rng = learned(), np.random.default_rng(1)
    for i in range(50):
        load = some_load(rng, prefill=i % 2 == 0)
        assert cost.seconds(load) == pytest.approx(true_seconds(load), rel=0.1)


def test_learn_one_step_held_up_changes_little() -> None:
    cost, load = learned(), StepLoad(16, 1600)
    before = cost.seconds(load)
    cost.learn(load, 100.0)
    for _ in range(8):  # until the next fit
        cost.learn(load, before)
    assert cost.seconds(load) == pytest.approx(before, rel=0.15)


def test_learn_machine_twice_as_slow_is_followed() -> None:
    cost, rng = learned(), np.random.default_rng(2)
    for i in range(800):
        load = some_load(rng, prefill=i % 2 == 0)
        cost.learn(load, 2 * true_seconds(load))
    assert cost.seconds(StepLoad(16, 1600)) == pytest.approx(
        2 * true_seconds(StepLoad(16, 1600)), rel=0.1
    )


@pytest.mark.parametrize("prefill", [True, False])
def test_learn_one_kind_for_long_does_not_forget_the_other(prefill: bool) -> None:
    cost, rng = learned(), np.random.default_rng(3)
    for _ in range(3000):
        load = some_load(rng, prefill=prefill)
        cost.learn(load, true_seconds(load))
    other = StepLoad(20, 2000) if prefill else StepLoad(20, 2000).with_chunk(100, 100)
    assert cost.seconds(other) == pytest.approx(true_seconds(other), rel=0.15)


def test_learn_steps_that_get_cheaper_with_more_work_never_gives_negative_costs() -> None:
    cost = StepCost()
    for n in range(1, 100):
        cost.learn(StepLoad(n, 10 * n, n, 5.0 * n), 1.0 / n)
    assert min(cost._fitted()) >= 0
    assert min(cost.prefill_costs()) >= 0


@given(
    seconds=st.floats(0, 10),
    token=st.floats(1e-6, 0.1),
    pair=st.one_of(st.just(0.0), st.floats(1e-9, 1e-3)),
    context=st.integers(0, 4000),
    wanted=st.integers(1, 600),
)
def test_grant_is_the_most_that_fits(
    seconds: float, token: float, pair: float, context: int, wanted: int
) -> None:
    n = Allowance(512, seconds, (token, pair)).grant(context, wanted)

    def takes(k: int) -> float:
        return token * k + pair * k * (context + k / 2)

    limit = min(wanted, 512)
    floor = min(limit, MIN_PREFILL_TOKENS)
    assert floor <= n <= limit
    if n > floor:
        assert takes(n) <= seconds * (1 + 1e-6)
    if n < limit:
        assert takes(n + 1) > seconds * (1 - 1e-6)


def test_grant_later_prompts_get_what_is_left() -> None:
    allowance = Allowance(256, 0.100, (0.001, 0.0))
    assert [allowance.grant(0, 60), allowance.grant(0, 60), allowance.grant(0, 60)] == [60, 40, 0]


def test_grant_does_not_cut_prompts_into_crumbs() -> None:
    allowance = Allowance(256, 0.100, (0.001, 0.0))
    assert allowance.grant(0, 95) == 95
    assert allowance.grant(0, 60) == 0  # five tokens are not worth a call
    assert allowance.grant(0, 4) == 4


@pytest.mark.parametrize("seconds", [0.1, math.inf])
def test_keep_leaves_its_share_for_afterwards(seconds: float) -> None:
    allowance = Allowance(200, seconds, (0.0005, 0.0))
    allowance.keep(0.5)
    assert allowance.grant(0, 1000) == 100
    allowance.give_back()
    assert allowance.grant(0, 1000) == 100


def test_keep_without_time_both_parts_still_advance() -> None:
    allowance = Allowance(200, 0.0, (0.001, 0.0))
    allowance.keep(0.5)
    assert allowance.grant(0, 100) == MIN_CHUNK_TOKENS
    assert allowance.grant(0, 100) == 0
    allowance.give_back()
    assert allowance.grant(0, 100) == MIN_CHUNK_TOKENS


def pacer(max_slowdown: float) -> PrefillPacer:
    made = PrefillPacer(max_slowdown)
    made.cost = learned()
    return made


@pytest.mark.parametrize(("max_slowdown", "contexts"), [(0.0, [100] * 8), (2.0, [])])
def test_allowance_without_limit_or_streams_is_every_token(
    max_slowdown: float, contexts: list[int]
) -> None:
    assert pacer(max_slowdown).allowance(contexts, 200).grant(1000, 500) == 200


@pytest.mark.parametrize("max_slowdown", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("context", [0, 1000, 4000])
def test_allowance_keeps_the_step_within_the_slowdown(max_slowdown: float, context: int) -> None:
    decodes = StepLoad(24, 2400)
    n = pacer(max_slowdown).allowance([100] * 24, 10_000).grant(context, 10_000)
    slowdown = true_seconds(decodes.with_chunk(context, n)) / true_seconds(decodes)
    if n > MIN_PREFILL_TOKENS:
        assert slowdown == pytest.approx(max_slowdown, rel=0.15)
    else:
        assert slowdown > 0.85 * max_slowdown


def test_allowance_lone_stream_may_wait_as_long_as_streams_usually_do() -> None:
    one = pacer(2.0)
    alone = one.allowance([100], 10_000).seconds
    for _ in range(1000):
        one.ran(StepLoad(32, 3200), true_seconds(StepLoad(32, 3200)))
    usual = 2 * true_seconds(StepLoad(32, 3200)) - true_seconds(StepLoad(1, 100))
    assert alone < usual / 2
    assert one.allowance([100], 10_000).seconds == pytest.approx(usual, rel=0.1)


def test_allowance_beside_a_queue_may_take_as_long_as_all_of_it_will() -> None:
    """Otherwise few streams leave little room for prompts, and stay few."""
    one = pacer(2.0)
    wanted = 2 * true_seconds(StepLoad(32, 3200)) - true_seconds(StepLoad(4, 400))
    assert one.allowance([100] * 4, 10_000, 28).seconds == pytest.approx(wanted, rel=0.1)
    assert one.allowance([100] * 4, 10_000).seconds < wanted / 2
