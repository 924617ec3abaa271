"""Fair shares on a simulated clock: weights, quiet tenants beside floods, places, KV blocks, nobody
starves.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from server.engine.request import Status
from server.engine.schedule.fair import QUANTUM_TOKENS
from server.tenants.principal import ANYBODY, Principal
from tests.server.engine.schedule.simulation import Backlog, Simulation, run_with

FLOOD, QUIET = Principal("flood"), Principal("quiet")


def flooded(n: int = 60, *, n_output: int = 200, **sizes: Any) -> Simulation:
    """A server all of whose places one tenant's long outputs hold, and as many more wait."""
    simulation = Simulation(**sizes)
    for _ in range(n):
        simulation.submit(FLOOD, n_output=n_output)
    simulation.run(20)
    assert len(simulation.scheduler.running) == simulation.max_num_seqs
    return simulation


# -- shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"n_prompt": 100, "n_output": 8}, {"n_output": 100}])
def test_weights_divide_the_tokens_within_five_percent(shape: dict[str, int]) -> None:
    simulation = Simulation()
    light, heavy = Principal("light"), Principal("heavy", weight=3.0)
    backlogs = [Backlog(simulation, principal, 20, **shape) for principal in (light, heavy)]
    run_with(simulation, 1200, *backlogs)  # a minute
    ratio = simulation.spent["heavy"].weighted / simulation.spent["light"].weighted
    assert ratio == pytest.approx(3.0, rel=0.05)


def test_shares_are_of_tokens_whatever_the_requests_look_like() -> None:
    simulation = Simulation()
    few_long = Backlog(simulation, Principal("long"), 6, n_prompt=200, n_output=150)
    many_short = Backlog(simulation, Principal("short"), 40, n_prompt=20, n_output=5)
    run_with(simulation, 1200, few_long, many_short)
    served = [spent.weighted for spent in simulation.spent.values()]
    assert sum(served) ** 2 / (2 * sum(one**2 for one in served)) >= 0.98  # Jain's index


def test_one_tenant_is_served_in_the_order_it_came() -> None:
    orders = []
    for policy in ("fair", "fcfs"):
        simulation = Simulation(policy, n_kv_blocks=20)  # type: ignore[arg-type]
        sent = [simulation.submit(ANYBODY, 30, 10 + i % 7) for i in range(40)]
        simulation.steps_until(*sent)
        orders.append([(request.started_at, request.n_preemptions) for request in sent])
        assert simulation.scheduler.n_preemptions > 0
        simulation.assert_idle()
    assert orders[0] == orders[1]


def test_tenant_that_was_away_has_saved_nothing_up() -> None:
    simulation = Simulation()
    stayed, away = Backlog(simulation, FLOOD, 20), Backlog(simulation, QUIET, 20)
    run_with(simulation, 1200, stayed)
    before = simulation.spent["flood"].weighted
    run_with(simulation, 200, stayed, away)
    served = simulation.spent["flood"].weighted - before
    assert served == pytest.approx(simulation.spent["quiet"].weighted, rel=0.1)


def test_cancelled_requests_are_charged_for_what_was_computed_only() -> None:
    simulation = Simulation()
    gone = [simulation.submit(QUIET, n_prompt=1000, n_output=1000) for _ in range(20)]
    simulation.step()
    for request in gone:
        simulation.scheduler.remove(request)
    simulation.assert_idle()
    assert simulation.queue.counters.of("quiet").served == 256  # type: ignore[attr-defined]
    assert not simulation.queue.shifts


@pytest.mark.parametrize("finds_prefix", [True, False])
def test_cached_and_recomputed_prompt_tokens_are_charged_once(finds_prefix: bool) -> None:
    simulation = Simulation()
    simulation.scheduler.kv_blocks._reuse = finds_prefix
    first = simulation.submit(QUIET, n_prompt=160, n_output=4)
    simulation.run(2)
    simulation.scheduler._preempt(first, [])
    simulation.steps_until(first)
    assert simulation.queue.counters.of("quiet").served == pytest.approx(  # type: ignore[attr-defined]
        160 + 2 * 4, rel=0.01
    )


# -- a quiet tenant beside a flood -----------------------------------------------------------------


def test_quiet_tenant_finds_a_place_at_once_beside_a_flood_of_long_outputs() -> None:
    simulation = flooded()
    for _ in range(10):
        request = simulation.submit(QUIET)
        assert simulation.steps_until_started(request) == 1
        simulation.run(40)
        assert request.status is Status.FINISHED
    assert simulation.scheduler.n_preemptions == 10


def test_first_come_first_served_lets_a_quiet_tenant_wait_for_the_flood() -> None:
    simulation = flooded(policy="fcfs")
    request = simulation.submit(QUIET)
    assert simulation.steps_until_started(request, most=5000) > 200


def test_burst_takes_places_up_to_the_share_and_none_beyond_it() -> None:
    simulation = flooded()
    Backlog(simulation, QUIET, 30, n_output=200).top_up()
    simulation.run(20)
    assert simulation.n_running(QUIET) == simulation.n_running(FLOOD) == 4
    n_preemptions = simulation.scheduler.n_preemptions
    simulation.run(50)  # nothing goes to and fro
    assert simulation.scheduler.n_preemptions == n_preemptions == 4


def test_place_is_taken_from_the_youngest_that_decodes() -> None:
    simulation = Simulation(max_num_seqs=3, max_batch_tokens=64)
    old = [simulation.submit(FLOOD, n_output=200) for _ in range(2)]
    simulation.run(3)
    prefill = simulation.submit(FLOOD, n_prompt=2000)
    simulation.run(2)
    simulation.submit(QUIET)
    simulation.step()
    assert [request.n_preemptions for request in (*old, prefill)] == [0, 1, 0]


# -- KV blocks -------------------------------------------------------------------------------------


def test_long_requests_of_one_tenant_leave_kv_blocks_to_another() -> None:
    simulation = Simulation(n_kv_blocks=40)
    for _ in range(4):
        simulation.submit(FLOOD, n_prompt=150, n_output=400)
    simulation.run(10)
    assert simulation.scheduler.kv_blocks.n_free < 5
    quiet = simulation.submit(QUIET, n_prompt=100, n_output=40)
    assert simulation.steps_until(quiet) <= 50
    assert quiet.n_preemptions == 0


def test_kv_blocks_are_taken_from_who_holds_most_for_its_weight() -> None:
    simulation = Simulation(n_kv_blocks=30)
    small = [simulation.submit(QUIET, n_prompt=16, n_output=100) for _ in range(2)]
    large = [simulation.submit(FLOOD, n_prompt=100, n_output=200) for _ in range(3)]
    simulation.steps_until(*small, *large)
    assert sum(request.n_preemptions for request in large) > 0
    assert sum(request.n_preemptions for request in small) == 0
    simulation.assert_idle()


def test_request_larger_than_its_share_ends_beside_a_backlog() -> None:
    simulation = Simulation(n_kv_blocks=40)
    backlog = Backlog(simulation, QUIET, 10, n_prompt=60, n_output=60)
    run_with(simulation, 20, backlog)
    large = simulation.submit(FLOOD, n_prompt=300, n_output=300)
    for _ in range(5000):
        run_with(simulation, 1, backlog)
        if large.status is Status.FINISHED:
            break
    assert large.status is Status.FINISHED


def test_who_began_first_of_all_keeps_its_kv_blocks_however_many_it_has() -> None:
    simulation = Simulation(n_kv_blocks=30)
    large = simulation.submit(FLOOD, n_prompt=300, n_output=100)
    simulation.run(3)
    small = [simulation.submit(QUIET, n_prompt=16, n_output=60) for _ in range(3)]
    simulation.steps_until(large, *small)
    assert large.n_preemptions == 0 < sum(request.n_preemptions for request in small)


def test_who_gave_kv_blocks_returns_before_others_of_its_tenant_and_once() -> None:
    simulation = Simulation(n_kv_blocks=40)
    for _ in range(2):
        simulation.submit(FLOOD, n_prompt=290, n_output=100)
    simulation.run(5)
    later = simulation.submit(FLOOD, n_prompt=100, n_output=1)
    simulation.step()
    assert simulation.scheduler.kv_blocks.n_free < 7  # not enough for it
    quiet = simulation.submit(QUIET, n_prompt=100, n_output=60)
    simulation.step()
    assert quiet.started_at is not None
    assert later.started_at is None
    simulation.steps_until(quiet)
    assert simulation.scheduler.n_preemptions == 1  # it would not have fitted before


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_preempted_requests_return_when_all_of_them_fits(policy: Any) -> None:
    simulation = Simulation(policy, n_kv_blocks=40, max_batch_tokens=64)
    sent = [simulation.submit((FLOOD, QUIET)[i % 2], 200, 140) for i in range(8)]
    simulation.steps_until(*sent)
    assert 0 < simulation.scheduler.n_preemptions <= 20  # a hundred if a first chunk were enough


# -- variants --------------------------------------------------------------------------------------


def test_tenant_below_its_share_finds_a_place_for_its_variant_at_once() -> None:
    simulation = Simulation(max_variants=3)
    sent = [simulation.submit(FLOOD, n_output=300, variant=f"v{i % 5}") for i in range(30)]
    simulation.run(20)
    quiet = simulation.submit(QUIET, variant="own")
    assert simulation.steps_until_started(quiet) == 1
    assert simulation.steps_until(quiet) < 20
    assert len({request.variant.key for request in simulation.scheduler.running}) <= 3
    assert sent[0].n_preemptions == 0  # who began first of all goes on


def test_variant_of_who_began_first_of_all_does_not_give_way() -> None:
    simulation = Simulation(max_variants=2)
    first = simulation.submit(FLOOD, n_output=300, variant="one")
    simulation.run(2)
    others = [simulation.submit(FLOOD, n_output=300, variant="three") for _ in range(3)]
    simulation.run(2)
    quiet = simulation.submit(QUIET, variant="own")
    simulation.step()
    assert quiet.started_at is not None
    assert [request.n_preemptions for request in (first, *others)] == [0, 1, 1, 1]


def test_tenants_of_variants_in_the_step_overtake_within_the_quantum_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.engine.schedule.scheduler.MAX_OVERTAKEN_S", 1e9)
    simulation = Simulation(max_variants=1, max_num_seqs=2, max_batch_tokens=17)  # one a step
    stays = Backlog(simulation, FLOOD, 4, n_output=10, variant="mixed")
    run_with(simulation, 20, stays)
    blocked = simulation.submit(QUIET, variant="other")  # two places of one cannot be halved
    before = simulation.spent["flood"].weighted
    while blocked.started_at is None:
        run_with(simulation, 1, stays)
        assert simulation.now < 1200, "it starves"
    overtook = simulation.spent["flood"].weighted - before
    assert 0.9 * QUANTUM_TOKENS < overtook < QUANTUM_TOKENS + 2 * (16 + 2 * 10)


# -- nobody starves --------------------------------------------------------------------------------

TENANT = st.fixed_dictionaries(
    {
        "weight": st.sampled_from([0.5, 1.0, 3.0]),
        "n_open": st.integers(1, 6),
        "n_prompt": st.integers(1, 200),
        "n_output": st.integers(1, 30),
    }
)


@given(
    st.lists(TENANT, min_size=1, max_size=4),
    st.sampled_from([18, 60, 1000]),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 10),
)
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_every_request_ends_while_all_keep_asking(
    tenants: list[dict[str, Any]], n_kv_blocks: int, max_variants: int, n_cancelled: int
) -> None:
    """With few KV blocks (a request of the largest needs 15), few variants, and some cancelled."""
    simulation = Simulation(
        max_num_seqs=4, n_kv_blocks=n_kv_blocks, max_variants=max_variants, max_batch_tokens=64
    )
    backlogs = []
    for i, shape in enumerate(tenants):
        principal = Principal(f"t{i}", weight=shape.pop("weight"))
        backlogs.append(Backlog(simulation, principal, variant=f"v{i}", **shape))
    run_with(simulation, 1, *backlogs)
    first = [request for backlog in backlogs for request in backlog.requests]
    for number in range(n_cancelled):
        run_with(simulation, 3, *backlogs)
        theirs = backlogs[0].requests
        if (request := theirs[number % len(theirs)]).status is not Status.FINISHED:
            simulation.scheduler.remove(request)
    for _ in range(20_000):
        if all(request.status is Status.FINISHED for request in first):
            break
        run_with(simulation, 1, *backlogs)
    assert all(request.status is Status.FINISHED for request in first), "somebody starves"
    simulation.steps_until(*(request for backlog in backlogs for request in backlog.requests))
    simulation.assert_idle()
