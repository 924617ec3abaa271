"""Threads of low priority that compute alone, and leave everybody else as they were."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from server.deltas.background import NICENESS, background_pool

WITH_OPENMP = "OpenMP" in torch.__config__.parallel_info()


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_pool_threads_have_low_priority_and_nobody_else_has() -> None:
    before = niceness()
    with background_pool(2, "low") as pool:
        meet = threading.Barrier(2)  # so that each thread takes one

        def measured() -> int:
            meet.wait(30)
            return niceness()

        assert {future.result() for future in [pool.submit(measured) for _ in range(2)]} == {
            max(NICENESS, before)
        }
    assert niceness() == before


@pytest.mark.skipif(not WITH_OPENMP, reason="torch's threads are the process's")
def test_pool_threads_compute_alone_and_new_threads_of_others_do_not() -> None:
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with background_pool(1, "alone") as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 3
            seen: list[int] = []
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert seen == [3]
    finally:
        torch.set_num_threads(count)
