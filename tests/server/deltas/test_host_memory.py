"""Memory goes back to the system once loads have ended."""

from __future__ import annotations

import platform
import resource
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from compressor.artifact.reader import Artifact
from server.deltas import loader
from server.deltas.host_memory import trim_heap
from server.deltas.loader import DeltaLoader
from server.deltas.loads import LoadCopied, LoadDecoded, LoadJob
from server.deltas.slots import SlotTable


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no trim")
def test_freed_memory_below_memory_in_use_is_given_back() -> None:
    blocks = [torch.ones(15_000) for _ in range(1000)]  # of the heap, not mapped one by one
    kept = torch.ones(15_000)
    del blocks
    before = resident_bytes()
    trim_heap()
    assert before - resident_bytes() > 30e6
    assert bool((kept == 1).all())


def test_heap_is_trimmed_once_after_the_last_load(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(loader, "trim_heap", lambda: trimmed.append(True))
    slots = SlotTable(2, 1000)
    loads = DeltaLoader({}, slots, lambda message: None, Mock())

    def unreadable() -> Artifact:
        raise AssertionError("not read here")

    for name in ("a", "b"):
        job = LoadJob(name, name, "apply", unreadable)
        loads._loading.add(name)
        decoded = LoadDecoded(job, (), 0, time.monotonic())
        loads.handle(LoadCopied(decoded, slots.assign(name, 0), 0.0))
    loads._loading.add("c")
    loads.assign_slots()
    loads._loading.discard("c")
    assert not trimmed
    for _ in range(2):
        loads.assign_slots()
    loads._copier.shutdown(wait=True)  # `close` would cancel what has not begun
    assert trimmed == [True]
