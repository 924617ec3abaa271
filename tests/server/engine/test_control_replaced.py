"""One name replaced again and again: nothing of what it was is left anywhere."""

from __future__ import annotations

import gc
import shutil
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compressor.artifacts import seal
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_control import HOST, Client
from tests.server.engine.test_llm_engine import running, until

pytestmark = pytest.mark.usefixtures("shared_text_workers")
CONTAINERS = (dict, set, list, deque, OrderedDict, Counter, defaultdict)


def n_entries() -> int:
    """Of all containers of the process, whoever has them."""
    gc.collect()
    return sum(len(one) for one in gc.get_objects() if type(one) in CONTAINERS)


def replace_delta(folder: Path, i: int) -> None:
    """Give a delta other bytes of the same meaning."""
    text = (folder / "delta_config.json").read_text().rstrip()
    (folder / "delta_config.json").write_text(text + "\n" + " " * i)
    seal(folder)


@pytest.mark.parametrize("n", [30, pytest.param(500, marks=pytest.mark.slow)])
async def test_name_replaced_many_times_leaves_memory_and_every_map_as_they_were(
    served: Callable[..., Served], tmp_path: Path, n: int
) -> None:
    pair = served("llama", PAIR)
    deltas = Path(shutil.copytree(pair.deltas, tmp_path / "deltas"))
    async with running(replace(pair, deltas=deltas), **HOST) as engine:
        client = Client(engine)
        fleet = client.app.state.api.fleet

        async def replace_and_use(i: int) -> None:
            replace_delta(deltas / "impart", i)
            await client.post("rescan")
            assert (await client.complete("impart", 2)).status_code == 200
            fleet.put("variant", "impart", {"registered_at": i})

        for i in range(10):
            await replace_and_use(i)
        before = n_entries()
        for i in range(10, 10 + n):
            await replace_and_use(i)
        await until(lambda: len(engine.core.slots.residents()) == 1)
        assert n_entries() - before < max(2 * n, 100), "something is kept of each"
        loader, digest = engine.core.loader, engine.model("impart").digest  # type: ignore[union-attr]
        (key,) = (slot.key for slot in engine.core.slots.residents())
        assert key.startswith(str(digest))
        assert loader.host.keys() == [key]
        assert (len(loader.costs), len(engine._history), loader.errors) == (1, 1, {})
        assert (await client.state("impart")) == "ready"
        assert len(fleet.history("variant", "impart")) <= 100
