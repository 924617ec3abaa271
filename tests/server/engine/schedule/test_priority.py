"""The most urgent first, of equals who came first; who gives way when KV blocks run out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.tenants.principal import ANYBODY
from tests.server.engine.schedule.simulation import Simulation


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_requests_start_by_priority_and_then_as_they_came(priorities: list[int]) -> None:
    simulation = Simulation("priority", max_num_seqs=1)
    sent = [simulation.submit(ANYBODY, n_output=1, priority=one) for one in priorities]
    simulation.steps_until(*sent)
    started = sorted(range(len(sent)), key=lambda i: sent[i].started_at or 0.0)
    assert started == sorted(range(len(sent)), key=lambda i: (priorities[i], i))
    simulation.assert_idle()


def test_urgent_request_waits_for_a_place_and_overtakes_all_who_wait() -> None:
    simulation = Simulation("priority", max_num_seqs=2)
    sent = [simulation.submit(ANYBODY, n_output=30) for _ in range(6)]
    simulation.run(5)
    urgent = simulation.submit(ANYBODY, priority=-1)
    simulation.steps_until(*sent, urgent)
    assert simulation.scheduler.n_preemptions == 0
    assert urgent.started_at == sent[2].started_at  # both places came free
    assert urgent.started_at < sent[3].started_at  # type: ignore[operator]


def test_least_urgent_request_gives_way_when_kv_blocks_run_out() -> None:
    simulation = Simulation("priority", n_kv_blocks=12)
    idle = [simulation.submit(ANYBODY, 30, 60, priority=5) for _ in range(2)]
    simulation.run(3)
    urgent = [simulation.submit(ANYBODY, 30, 60, priority=-1) for _ in range(2)]
    assert simulation.steps_until(*urgent) <= 62  # nothing held them up
    assert all(request.n_preemptions > 0 for request in idle)
    simulation.steps_until(*idle)
    simulation.assert_idle()


def test_cancelled_while_waiting_leaves_nothing() -> None:
    simulation = Simulation("priority", max_num_seqs=1)
    sent = [simulation.submit(ANYBODY, priority=i % 2) for i in range(5)]
    simulation.step()
    for request in sent:
        simulation.scheduler.remove(request)
    simulation.assert_idle()
