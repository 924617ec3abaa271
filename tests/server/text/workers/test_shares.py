"""Whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from server.text.workers.shares import ShareQueue


@dataclass(eq=False)
class Task:
    key: str
    shares: tuple[str, ...] = ()
    tenant: str = "t"
    is_wanted: bool = field(default=True)


def queue(n_workers: int = 3, max_waiting: int = 100) -> ShareQueue[Task]:
    return ShareQueue(n_workers, max_waiting)


def test_keys_take_turns() -> None:
    tasks = [Task("a"), Task("a"), Task("a"), Task("b"), Task("c")]
    line = queue()
    for task in tasks:
        assert line.put(task)
    assert [line.take(3) for _ in range(6)] == [tasks[i] for i in (0, 3, 4, 1, 2)] + [None]


def test_share_leaves_a_worker_for_others() -> None:
    line = queue(n_workers=3)
    hogs = [Task("a", ("a",)) for _ in range(3)]
    for task in hogs:
        line.put(task)
    assert [line.take(3), line.take(3), line.take(3)] == [hogs[0], hogs[1], None]
    other = Task("b", ("b",))
    line.put(other)
    assert line.take(3) is other
    line.done(hogs[0])
    assert line.take(3) is hogs[2]


def test_short_task_passes_long_ones_of_its_own_key() -> None:
    line = queue(n_workers=2)
    first, second, short = Task("a", ("long",)), Task("a", ("long",)), Task("a")
    for task in (first, second, short):
        line.put(task)
    assert [line.take(2), line.take(2), line.take(2)] == [first, short, None]


def test_share_waits_while_another_worker_is_replaced() -> None:
    line = queue(n_workers=2)
    hog, other = Task("a", ("a",)), Task("b")
    line.put(hog)
    assert line.take(1) is None
    line.put(other)
    assert line.take(1) is other
    assert line.take(2) is hog


def test_one_worker_serves_every_share() -> None:
    line = queue(n_workers=1)
    task = Task("a", ("a",))
    line.put(task)
    assert line.take(1) is task


def test_tenants_take_turns_and_so_do_keys_of_each() -> None:
    tasks = [
        Task("a"),
        Task("b"),
        Task("a"),
        Task("c"),
        Task("a", tenant="u"),
        Task("a", tenant="u"),
    ]
    line = queue(n_workers=9)
    for task in tasks:
        line.put(task)
    assert [line.take(9) for _ in range(6)] == [tasks[i] for i in (0, 4, 1, 5, 3, 2)]


def test_tenant_leaves_a_worker_for_others_whatever_its_keys() -> None:
    line = queue(n_workers=3)
    flood = [Task(key) for key in "abcdef"]
    line.put(Task("a", tenant="u"))
    for task in flood:
        line.put(task)
    line.done(line.take(3) or Task("none"))
    assert [line.take(3), line.take(3), line.take(3)] == [*flood[:2], None]
    other = Task("a", tenant="u")
    line.put(other)
    assert line.take(3) is other
    line.done(flood[0])
    assert line.take(3) is flood[2]


def test_only_tenant_may_have_all_workers() -> None:
    line = queue(n_workers=2)
    own, other, servers = Task("a"), Task("b"), Task("c", tenant="")
    for task in (own, other, servers):
        line.put(task)
    assert [line.take(2), line.take(2), line.take(2)] == [own, servers, other]


def test_full_queue_forgets_what_nobody_wants_before_it_refuses() -> None:
    line = queue(max_waiting=2)
    gone, waiting = Task("a"), Task("b")
    assert line.put(gone)
    assert line.put(waiting)
    assert not line.put(Task("c"))
    gone.is_wanted = False
    assert line.put(Task("c"))
    assert len(line) == 2


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from("tu")), max_size=30)
)
def test_every_task_comes_once_and_no_share_takes_all_workers(wanted: list) -> None:
    line, n_workers = queue(n_workers=3), 3
    tasks = [Task(key, (key, "long") if long else (key,), tenant) for key, long, tenant in wanted]
    n_tenants = len({task.tenant for task in tasks})
    for task in tasks:
        line.put(task)
    running: list[Task] = []
    seen: list[Task] = []
    while len(seen) < len(tasks):
        while len(running) < n_workers and (task := line.take(n_workers)) is not None:
            running.append(task)
            seen.append(task)
        for share in "abc", "long":
            assert sum(share in task.shares for task in running) < n_workers
        for tenant in "tu" if n_tenants > 1 else "":
            assert sum(task.tenant == tenant for task in running) < n_workers
        assert running
        line.done(running.pop(0))
    assert sorted(map(id, seen)) == sorted(map(id, tasks))
    assert len(line) == 0
