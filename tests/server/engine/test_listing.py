"""What is listed of models: all of them, one, or those at work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import DeltaBroken
from tests.compressor.artifacts import seal
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_llm_engine import PROMPT, ask, running

pytestmark = pytest.mark.usefixtures("shared_text_workers")


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


async def test_models_show_state_mode_bytes_and_failure(pair: Served, tmp_path: Path) -> None:
    deltas = shutil.copytree(pair.deltas, tmp_path / "deltas")
    bad = shutil.copytree(deltas / "impart", deltas / "bad")
    with (bad / "delta_config.json").open("ab") as config:
        config.write(b"\n")  # of a digest of its own: no other copy can stand in
    seal(bad)
    (bad / "delta.safetensors").write_bytes(b"cut short")
    modes = {"impart": "reconstruct"}
    async with running(replace(pair, deltas=deltas), mode_overrides=modes) as engine:
        assert {i.name: i.state for i in engine.models()} == {
            "base": "ready",
            "bad": "registered",
            "blockdiag": "registered",
            "impart": "registered",
        }
        assert engine.models_at_work() == []
        answers = [await ask(engine, name) for name in ("impart", "blockdiag")]
        with pytest.raises(DeltaBroken, match="Corrupt"):
            await ask(engine, "bad")
        infos = {i.name: i for i in engine.models()}
        assert [infos[n].state for n in ("base", "impart", "blockdiag", "bad")] == [
            *["ready"] * 3,
            "failed",
        ]
        assert [infos[n].mode for n in ("impart", "blockdiag")] == ["reconstruct", "apply"]
        assert infos["impart"].resident_bytes > infos["blockdiag"].resident_bytes > 0
        assert infos["bad"].error is not None
        assert str(deltas) not in infos["bad"].error
        assert engine.models_at_work() == [infos[n] for n in ("bad", "blockdiag", "impart")]
        assert engine.model("base") == infos["base"]
        assert engine.model("base:impart") == infos["impart"]
        assert engine.model("nobody") is None
        prompt = await engine.encode(await engine.open("base"), PROMPT)
        names = ("impart", "blockdiag")
        assert answers == [pair.truth(name, prompt)[:12] for name in names]
