"""Pinning by names, through the engine's public face."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.engine.pins import Pinner
from server.engine.residents import Pin
from server.engine.variant import Variant
from server.errors import ConfigError, DeltaBroken
from server.tenants.principal import Principal
from tests.server.conftest import PAIR, Served
from tests.server.engine.test_llm_engine import running, until

pytestmark = pytest.mark.usefixtures("shared_text_workers")
ACME, GLOBEX = Principal("acme"), Principal("globex", resident_bytes=100)


class Catalog:
    """Of variants whose digest is their name's first letter."""

    registry = SimpleNamespace(get=lambda name: None if name == "unknown" else name)

    def key_of(self, delta: str) -> str:
        return delta[0]


async def opened(name: str) -> Variant:
    if name == "broken":
        raise DeltaBroken("it is broken")
    return cast(Variant, SimpleNamespace(name=name, key=name[0]))


def pinner(
    taken: list[Sequence[Pin]],
    open: Callable[[str], Awaitable[Variant]] = opened,
    is_warming: Callable[[], bool] = lambda: False,
) -> Pinner:
    async def take(pins: Sequence[Pin]) -> None:
        taken.append(pins)

    return Pinner(cast(Any, Catalog()), 2, open=open, take=take, is_warming=is_warming)


async def test_pin_names_of_one_digest_are_one_pin_for_all_its_tenants() -> None:
    taken: list[Sequence[Pin]] = []
    await pinner(taken).pin({ACME: ["alpha", "broken"], GLOBEX: ["a2", "alpha"]})
    ((pin,),) = taken
    assert pin.variant.name == "alpha"
    assert {(holder.tenant, holder.max_bytes) for holder in pin.holders} == {
        ("acme", None),
        ("globex", 100),
    }


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["unknown"], "tenant acme pins unknown"),
        (["a", "b", "c"], "3 variants are pinned, and there are 2"),
    ],
)
async def test_pin_what_cannot_be_is_refused_and_the_former_pins_stay(
    names: list[str], says: str
) -> None:
    taken: list[Sequence[Pin]] = []
    of = pinner(taken)
    await of.pin({ACME: ["alpha"]})
    with pytest.raises(ConfigError, match=says):
        await of.pin({ACME: names})
    assert len(taken) == 1
    await of.again()
    assert [pin.variant.name for pin in taken[1]] == ["alpha"]


async def test_pin_waits_for_kernels_and_the_last_asked_for_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.engine.pins.KERNELS_WAIT_S", 0.001)
    taken: list[Sequence[Pin]] = []
    warming = [True]
    of = pinner(taken, is_warming=lambda: warming[0])
    asked = [asyncio.create_task(of.pin({ACME: [name]})) for name in ("alpha", "beta")]
    await asyncio.sleep(0.01)
    assert taken == []
    warming[0] = False
    await asyncio.gather(*asked)
    assert [pin.variant.name for pins in taken for pin in pins] == ["beta"]


async def test_pinned_variant_is_ready_without_a_request_and_is_shown(
    served: Callable[..., Served],
) -> None:
    async with running(served("llama", PAIR), kernels="torch", self_check=False) as engine:
        await engine.pin({ACME: ["impart"]})

        def states() -> dict[str, tuple[str, bool]]:
            return {info.name: (info.state, info.pinned) for info in engine.models()}

        await until(lambda: states()["impart"] == ("ready", True))
        assert states()["blockdiag"] == ("registered", False)
        use = engine.tenant_use()["acme"]
        assert (use.n_resident_variants, use.resident_bytes > 0) == (1, True)
        await asyncio.to_thread(engine.rescan)
        await until(lambda: states()["impart"] == ("ready", True))
