"""The cost model and hysteresis of automatic reconstruct, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.reconstruct.policy import (
    DEMOTE,
    GAIN,
    HORIZON_S,
    MIN_RESIDENCE_S,
    MIN_SHARE,
    RETRY_S,
    Decision,
    HotPolicy,
)

STEP_S = 0.1


def policy(budget: int = 130, build_s: float = 1.0) -> HotPolicy:
    """One variant takes 100 bytes, building it 30 more."""
    return HotPolicy(budget, 100, 30, build_s)


class Clock:
    """Runs traffic against a policy and carries its decisions out."""

    def __init__(self, hot: HotPolicy) -> None:
        self.hot = hot
        self.now = 1000.0

    def run(self, seconds: float, **shares: float) -> list[Decision]:
        """Steps of each variant alone, in these shares of the time; the rest is mixed steps."""
        owed = dict.fromkeys(shares, 0.0)
        decisions = []
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            key = max(shares, key=lambda k: owed[k] + shares[k], default=None)
            for name, share in shares.items():
                owed[name] += share
            if key is not None and owed[key] >= 1:
                owed[key] -= 1
            else:
                key = None
            self.hot.ran(key, STEP_S, self.now)
            decisions.append(self.follow())
        return [d for d in decisions if d != Decision()]

    def follow(self) -> Decision:
        decision = self.hot.decide(self.now)
        for key in decision.demote:
            self.hot.dropped(key)
        if decision.promote is not None:
            self.hot.started(decision.promote)
            self.hot.finished(decision.promote, 100, self.hot.build_s, self.now)
        return decision


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_share_is_the_part_of_time_in_steps_of_the_variant_alone(share: float) -> None:
    clock = Clock(policy(budget=0))
    clock.run(120, a=share)
    assert clock.hot.share("a", clock.now) == pytest.approx(share, abs=0.03)
    clock.run(120)
    assert clock.hot.share("a", clock.now) < 0.05


def test_share_of_a_burst_is_small() -> None:
    clock = Clock(policy())
    assert clock.run(2, a=1.0) == []


def test_threshold_is_where_the_saving_pays_for_the_build() -> None:
    assert policy(build_s=1e-3).threshold == MIN_SHARE
    costly = policy(build_s=0.6 * GAIN * HORIZON_S)
    assert costly.threshold == pytest.approx(0.6)
    assert costly.threshold * GAIN * HORIZON_S == pytest.approx(costly.build_s)


@pytest.mark.parametrize(("share", "promoted"), [(0.5, False), (0.7, True)])
def test_decide_promotes_only_above_the_threshold(share: float, promoted: bool) -> None:
    clock = Clock(policy(build_s=0.6 * GAIN * HORIZON_S))
    assert [d.promote for d in clock.run(200, a=share)] == (["a"] if promoted else [])


def test_decide_build_that_never_pays_is_never_begun() -> None:
    clock = Clock(policy(build_s=1.1 * GAIN * HORIZON_S))
    assert clock.run(200, a=1.0) == []


def test_decide_without_a_budget_does_nothing() -> None:
    clock = Clock(policy(budget=0))
    assert clock.run(200, a=1.0) == []


def test_decide_budget_without_room_for_the_build_does_nothing() -> None:
    clock = Clock(policy(budget=129))
    assert clock.run(200, a=1.0) == []


def test_decide_between_the_thresholds_changes_nothing() -> None:
    between = (1 + DEMOTE) / 2 * MIN_SHARE
    clock = Clock(policy())
    assert clock.run(300, a=between) == []
    assert [d.promote for d in clock.run(100, a=0.9)] == ["a"]
    assert clock.run(600, a=between) == []
    assert clock.hot.reconstructed == {"a": 100}


def test_decide_cold_variant_is_demoted_but_not_before_its_time() -> None:
    clock = Clock(policy())
    while not clock.hot.reconstructed:
        clock.run(STEP_S, a=1.0)
    since = clock.now
    clock.hot._seconds.clear()  # nothing at all from now on
    while clock.hot.reconstructed:
        clock.run(STEP_S)
    assert clock.now - since == pytest.approx(MIN_RESIDENCE_S, abs=2 * STEP_S)


def test_decide_full_budget_gives_way_only_to_a_much_hotter_variant() -> None:
    clock = Clock(policy())
    clock.run(100, a=0.4)
    assert clock.hot.reconstructed == {"a": 100}
    assert clock.run(300, a=0.4, b=0.55) == []
    (change,) = clock.run(300, a=0.25, b=0.7)
    assert change == Decision(("a",), "b")
    assert clock.run(300, a=0.25, b=0.7) == []


def test_decide_failed_build_is_not_tried_again_soon() -> None:
    clock = Clock(policy())
    clock.follow = Decision  # type: ignore[method-assign, assignment]
    clock.run(60, a=1.0)
    assert clock.hot.decide(clock.now).promote == "a"
    clock.hot.started("a")
    assert clock.hot.decide(clock.now).promote is None  # one at a time
    clock.hot.abandoned("a", clock.now, failed=True)
    clock.run(RETRY_S - 10, a=1.0)
    assert clock.hot.decide(clock.now).promote is None
    clock.run(20, a=1.0)
    assert clock.hot.decide(clock.now).promote == "a"


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(0, 500),
    events=st.lists(
        st.tuples(st.sampled_from("abcd-"), st.floats(0.1, 40), st.booleans()), max_size=60
    ),
)
def test_weights_and_the_build_under_way_never_exceed_the_budget(
    budget: int, events: list[tuple[str, float, bool]]
) -> None:
    hot, now, building = policy(budget, build_s=0.01), 0.0, None

    def used() -> int:
        return sum(hot.reconstructed.values()) + (130 if building is not None else 0)

    for key, seconds, build_ends in events:
        now += seconds
        hot.ran(None if key == "-" else key, seconds, now)
        decision = hot.decide(now)
        for cold in decision.demote:
            hot.dropped(cold)
        if decision.promote is not None:
            assert building is None, "one at a time"
            building = decision.promote
            hot.started(building)
        assert used() <= budget
        if building is not None and build_ends:
            hot.finished(building, 100, 0.01, now)
            building = None
        assert used() <= budget
