"""Folders that come, change and go are known without a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from server.deltas.registry import DeltaRegistry
from server.process.watch import watch_deltas
from tests.compressor.artifacts import BASE, edit_config, write_artifact


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_folder_that_comes_changes_and_goes_is_known(tmp_path: Path) -> None:
    root, made = tmp_path / "deltas", tmp_path / "made"
    root.mkdir()
    write_artifact(made)
    registry = DeltaRegistry(root, BASE)
    watching = asyncio.create_task(watch_deltas(root, registry.rescan, settle_ms=50))
    await asyncio.sleep(0.3)  # the kernel is told what to watch

    half = root / "one"
    half.mkdir()
    shutil.copy(made / "delta_config.json", half)
    await until(lambda: registry.get("one") is not None)
    assert registry.get("one").error is not None
    shutil.copytree(made, half, dirs_exist_ok=True)
    await until(lambda: registry.get("one").error is None)

    first = registry.get("one").digest
    edit_config(made, lambda record: record.update(created_by="second"))
    os.rename(half, tmp_path / "old")
    os.rename(made, half)
    await until(lambda: registry.get("one") is not None and registry.get("one").digest != first)
    shutil.rmtree(half)
    await until(lambda: registry.get("one") is None)

    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


async def test_folder_that_cannot_be_watched_is_told_and_stops_nothing(
    tmp_path: Path, caplog
) -> None:
    await watch_deltas(tmp_path / "none", lambda: None)
    assert "cannot be watched" in caplog.text
    assert "SIGHUP" in caplog.text
