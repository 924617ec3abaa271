"""Variants with certificates on a real engine: a faithful one, one that is the base, floors."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.artifact.certificate import dump_certificate, read_certificate
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from server.errors import DeltaBroken, InvalidRequest
from tests.compressor.artifacts import seal
from tests.server.conftest import Served
from tests.server.engine.test_llm_engine import PROMPT, ask, is_empty, running, until
from tests.tiny import perturb

pytestmark = pytest.mark.usefixtures("shared_text_workers")
CERTIFIED = {
    "tuned": Options(codec="blockdiag", ratio=7, certificate=True),
    "plain": Options(codec="blockdiag", ratio=9),
}


@pytest.fixture
def certified(served: Callable[..., Served]) -> Served:
    return served("llama", CERTIFIED)


@pytest.fixture
def impostor(certified: Served, tmp_path: Path) -> Served:
    """As `certified`, with a variant that changes next to nothing and claims to be `tuned`."""
    deltas = shutil.copytree(certified.deltas, tmp_path / "deltas")
    nearly = perturb(certified.base, tmp_path / "nearly", seed=99, scale=1e-6)
    compress(certified.base, nearly, deltas / "impostor", Options(codec="blockdiag", ratio=7))
    shutil.copy(deltas / "tuned" / "certificate.json", deltas / "impostor")
    seal(deltas / "impostor")
    return replace(certified, deltas=deltas)


async def test_verify_of_a_faithful_variant_agrees_as_when_it_was_made(certified: Served) -> None:
    certificate, digest = read_certificate(certified.deltas / "tuned")
    assert certificate is not None
    async with running(certified) as engine:
        found = await engine.verify("tuned")
        assert (found["verdict"], found["digest"]) == ("faithful", digest)
        assert found["agreement"] == pytest.approx(certificate.top1_agreement, abs=0.02)
        assert found["drift_per_token"] < 2e-3  # both in float32
        assert len(found["prompts"]) == len(certificate.prompts)
        with pytest.raises(InvalidRequest, match="no certificate"):
            await engine.verify("plain")
        with pytest.raises(InvalidRequest, match="no certificate"):
            await engine.verify("base")
        await until(lambda: is_empty(engine))


async def test_open_of_a_variant_that_answers_as_the_base_is_refused_and_others_go_on(
    impostor: Served,
) -> None:
    async with running(impostor) as engine:
        refused = await asyncio.gather(
            *(ask(engine, "impostor") for _ in range(3)), return_exceptions=True
        )
        assert all(isinstance(error, DeltaBroken) for error in refused)
        assert "as the base does" in str(refused[0])
        info = engine.model("impostor")
        assert info is not None
        assert (info.state, "as the base does" in (info.error or "")) == ("failed", True)
        assert "impostor" in [one.name for one in engine.models_at_work()]
        assert (await engine.verify("impostor"))["verdict"] == "is_base"
        variant = await engine.open("tuned")
        prompt = await engine.encode(variant, PROMPT)
        assert await ask(engine, "tuned") == impostor.truth("tuned", prompt)[:12]
        engine.rescan()  # looked at again, and found wanting again
        with pytest.raises(DeltaBroken):
            await engine.open("impostor")
        await until(lambda: is_empty(engine))


async def test_verify_on_load_refuses_what_is_below_the_floor_or_has_no_certificate(
    certified: Served, tmp_path: Path
) -> None:
    deltas = shutil.copytree(certified.deltas, tmp_path / "deltas")
    worse = shutil.copytree(deltas / "tuned", deltas / "worse")
    certificate, _ = read_certificate(worse)
    assert certificate is not None
    last = certificate.prompts[-1]
    wrong = replace(last, tokens=tuple(5 + (token == 5) for token in last.tokens))
    (worse / "certificate.json").write_bytes(
        dump_certificate(replace(certificate, prompts=(*certificate.prompts[:-1], wrong)))
    )
    seal(worse)
    floor = certificate.top1_agreement - 0.02
    async with running(replace(certified, deltas=deltas), verify_on_load=floor) as engine:
        assert await ask(engine, "tuned")
        with pytest.raises(DeltaBroken, match="below the floor"):
            await engine.open("worse")
        with pytest.raises(DeltaBroken, match="no certificate"):
            await engine.open("plain")
        assert await ask(engine, "base")


async def test_open_of_a_certificate_that_does_not_fit_the_model_is_refused(
    certified: Served, tmp_path: Path
) -> None:
    deltas = shutil.copytree(certified.deltas, tmp_path / "deltas")
    certificate, _ = read_certificate(deltas / "tuned")
    assert certificate is not None
    foreign = tuple(replace(prompt, prompt=(1 << 30,)) for prompt in certificate.prompts)
    (deltas / "tuned" / "certificate.json").write_bytes(
        dump_certificate(replace(certificate, prompts=foreign))
    )
    seal(deltas / "tuned")
    async with running(replace(certified, deltas=deltas)) as engine:
        with pytest.raises(DeltaBroken, match="cannot be run here"):
            await engine.open("tuned")
