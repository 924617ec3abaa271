"""The async face of the engine: names, tokenising and streams. Implements `EngineClient`."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

from server.deltas.background import background_pool
from server.deltas.registry import RegisteredDelta
from server.engine.build import (
    ChooseSteps,
    EngineParts,
    build_engine,
    log_cpu,
    use_threads,
)
from server.engine.control import LiveVariants, tell_changes
from server.engine.lifecycle import Events
from server.engine.limits import check_request
from server.engine.listing import ModelListing
from server.engine.names import CatalogNames
from server.engine.observer import CoreStats, Observer
from server.engine.output import RequestOutput, TextOutput
from server.engine.pauses import PauseWatch
from server.engine.pins import Pinner
from server.engine.request import Request
from server.engine.schedule.admission import AdmissionTicket
from server.engine.single_flight import SingleFlight
from server.engine.tenant_use import use_by_tenant
from server.engine.types import (
    Generation,
    ModelInfo,
    SamplingParams,
    TenantUse,
    TextWorkerStats,
)
from server.engine.variant import Variant
from server.engine.vetting import Vetter
from server.settings import Settings
from server.tenants.principal import ANYBODY, NOBODY, Principal

log = logging.getLogger(__name__)


class LoopPublisher:
    """Takes events on the engine thread, a whole step's at once, to the event loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None  # until then nobody hears of any

    def __call__(self, events: Events) -> None:
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_deliver, events)


class LLMEngine:
    """Create with `from_settings` (loads the base), then `start` inside the event loop."""

    def __init__(self, parts: EngineParts, publisher: LoopPublisher) -> None:
        self._settings = parts.settings
        self._catalog = parts.catalog
        self.base_name = parts.catalog.base_name
        assert parts.settings.max_model_len is not None, "see `CoreParts`"
        self.max_model_len = parts.settings.max_model_len
        self.core = parts.core
        self._swap = parts.swap
        self._publisher = publisher
        self._text = parts.text
        # Their own, of low priority: who opens a variant must not keep others from tokenising. They
        # may wait long for a text worker that loads a tokenizer, which costs nothing.
        self._openers = background_pool(4, "opener")
        self._openings: SingleFlight[Variant] = SingleFlight(self._openers)
        self._vetter = Vetter(
            parts.catalog.certificate_of,
            self.generate,
            self._openers,
            parts.settings.verify_on_load,
        )
        self._listing = ModelListing(
            parts.core, parts.catalog, parts.text, self._vetter, self.max_model_len
        )
        self._history = parts.history
        self.variants = LiveVariants(parts.core, parts.catalog, parts.history, self.open)
        self._pinner = Pinner(
            parts.catalog,
            parts.settings.max_resident_variants,
            open=self.open,
            take=self.variants.take_pins,
            is_warming=lambda: self.core.stats().kernel_state == "compiling",
        )
        self.names = CatalogNames(
            parts.catalog,
            self._names_changed,
            lambda stage, name, why: self._history.tell(stage, name, None, reason=why),
        )
        self._pauses = PauseWatch(parts.settings.heartbeat_timeout_s / 2)
        self._started = False

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        observer: Observer | None = None,
        choose_steps: ChooseSteps | None = None,
    ) -> Self:
        """Load the base and register the deltas: see `build_engine`. Raises ConfigError."""
        threads = use_threads(settings)
        publisher = LoopPublisher()
        parts = build_engine(settings, publisher, observer, choose_steps=choose_steps)
        log_cpu(parts.base, threads)
        return cls(parts, publisher)

    def start(self) -> None:
        """Start the engine thread; events go to the running event loop."""
        self._publisher.loop = asyncio.get_running_loop()
        self._text.start()
        self.core.start()
        self._swap.start()
        self._pauses.start()
        self._started = True

    async def shutdown(self, drain_timeout_s: float) -> None:
        """Refuse new requests, let running ones finish, fail the rest, stop the thread."""
        self.drain()
        deadline = asyncio.get_running_loop().time() + drain_timeout_s
        while self.core.n_open and not self.core.dead:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.05)
        self._swap.close()
        await asyncio.to_thread(self.core.stop)
        self._pauses.stop()
        self._openers.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._text.close)

    # -- names -----------------------------------------------------------------------------------

    def models(self) -> Sequence[ModelInfo]:
        return self._listing.all()

    def model(self, name: str) -> ModelInfo | None:
        return self._listing.named(name)

    def models_at_work(self) -> Sequence[ModelInfo]:
        return self._listing.at_work()

    async def open(self, model: str, principal: Principal = ANYBODY) -> Variant:
        """See EngineClient. An artifact's configuration and text files are read on a thread of
        their own, once for all who ask meanwhile; its weights when the engine needs them.
        """
        variant = await self._opened(model)
        await self._vetter.vet(variant, principal)
        return variant

    async def verify(self, model: str) -> dict[str, Any]:
        variant = await self._opened(model)
        return {"digest": variant.digest, **await self._vetter.verify(variant)}

    async def _opened(self, model: str) -> Variant:
        known = self._catalog.cached(model)
        if known is not None:
            return known
        return await self._openings.run(model, lambda: self._catalog.open(model))

    def rescan(self) -> None:
        before = self._catalog.registry.all()
        self._catalog.rescan()
        self._names_changed(before)

    def _names_changed(self, before: Sequence[RegisteredDelta]) -> None:
        """Have everything that is kept by names and digests follow the registry."""
        keys = self._catalog.keys()
        self.core.loader.keep_errors(keys)
        self._vetter.keep(keys)
        self.core.between_steps(lambda: self._keep(keys))
        tell_changes(self._history, before, self._catalog.registry.all())
        if self._publisher.loop is not None and self._publisher.loop.is_running():
            asyncio.run_coroutine_threadsafe(self._mean_again(), self._publisher.loop)

    def _keep(self, keys: Collection[str]) -> None:
        """Forget what the folder has no more. Engine thread."""
        self.core.orders.keep(keys)
        self._history.keep(keys)

    async def _mean_again(self) -> None:
        """Names may mean others now."""
        self.variants.again()
        await self._pinner.again()

    async def pin(self, pinned: Mapping[Principal, Collection[str]]) -> None:
        await self._pinner.pin(pinned)

    # -- text ------------------------------------------------------------------------------------

    async def encode(
        self,
        variant: Variant,
        text: str,
        *,
        add_special_tokens: bool = True,
        tenant: str = NOBODY,
    ) -> list[int]:
        return await self._text.encode(
            variant.text,
            text,
            self.max_model_len,
            add_special_tokens=add_special_tokens,
            tenant=tenant,
        )

    async def decode(
        self, variant: Variant, token_ids: Sequence[int], *, is_whole: bool = True
    ) -> str:
        return await self._text.decode(variant.text, token_ids, is_whole=is_whole)

    async def token_texts(self, variant: Variant, token_ids: Sequence[int]) -> list[str]:
        return await self._text.token_texts(variant.text, token_ids)

    async def render_chat(
        self,
        variant: Variant,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tenant: str = NOBODY,
    ) -> list[int]:
        return await self._text.render_chat(
            variant.text,
            messages,
            self.max_model_len,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            add_special_tokens=add_special_tokens,
            tenant=tenant,
        )

    # -- generation ------------------------------------------------------------------------------

    def check_open(self, principal: Principal = ANYBODY) -> None:
        self.core.admission.check(principal)

    def admit(self, n_sequences: int, principal: Principal = ANYBODY) -> AdmissionTicket:
        return self.core.admission.admit(n_sequences, principal)

    def drain(self) -> None:
        self.core.admission.drain()
        self._history.feed.close()

    def generate(
        self,
        variant: Variant,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        on_output: Callable[[], None],
        ticket: AdmissionTicket | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        principal: Principal = ANYBODY,
        priority: int = 0,
    ) -> Generation:
        """See EngineClient."""
        check_request(
            prompt_ids, params, vocab_size=variant.vocab_size, max_model_len=self.max_model_len
        )
        output = RequestOutput(
            TextOutput(variant.text, params, prompt_ids),
            on_output,
            abort=lambda: self.core.abort(request),
            n_prompt_computed=lambda: request.n_prompt_computed,
        )
        request = Request(
            # Clients choose request ids; inside the engine they must be unique.
            request_id=f"{request_id}-{uuid.uuid4().hex}",
            variant=variant,
            prompt_ids=list(prompt_ids),
            params=params,
            deliver=output.receive,
            deadline=deadline,
            cache_salt=cache_salt,
            principal=principal,
            priority=max(priority, principal.max_priority),
        )
        self.core.submit(request, ticket)
        return output

    # -- health ----------------------------------------------------------------------------------

    def stats(self) -> CoreStats:
        return self.core.stats()

    def text_workers(self) -> TextWorkerStats:
        stats = self._text.stats()
        return TextWorkerStats(stats.n_busy, stats.n_waiting, stats.n_kills)

    def tenant_use(self) -> dict[str, TenantUse]:
        """By tenant's name; of those that hold nothing there is none."""
        return use_by_tenant(list(self.core.scheduler.running), self.core.slots.residents())

    def is_alive(self) -> bool:
        """Whether the loop lives. It beats once per layer, not only once per step: a long prompt
        on a slow machine is no hang, a kernel that never returns is one after
        `Settings.heartbeat_timeout_s`. While this process stood still no time passed for it.
        """
        longest_s = self._settings.heartbeat_timeout_s
        if self._pauses.resumed_within(longest_s):
            longest_s = math.inf
        return self._started and self.core.is_alive(longest_s)

    def is_ready(self) -> bool:
        return self.is_alive() and not self.core.admission.draining


def _deliver(events: Events) -> None:
    for request, event in events:
        request.deliver(event)
