"""Commands run in order, and one that asks to go on lets a step run before it does."""

from __future__ import annotations

from server.engine.inbox import Inbox


def test_commands_run_in_order_and_those_they_add_the_next_time():
    inbox, ran = Inbox(), []
    inbox.put(lambda: (ran.append(1), inbox.put(lambda: ran.append(4))))
    inbox.put(lambda: ran.append(2))
    inbox.put(lambda: ran.append(3))
    inbox.run(None)
    assert ran == [1, 2, 3]
    inbox.run(5.0)
    assert ran == [1, 2, 3, 4]
    inbox.run(None)
    assert inbox.empty()


def test_last_run_takes_what_commands_add_too():
    inbox, ran = Inbox(), []
    inbox.put(lambda: (inbox.put(lambda: ran.append(1)), 1 / 0))
    inbox.run_last()
    assert ran == [1]
