"""The async face of the engine: names, tokenising and streams. Implements `EngineClient`."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch

from compressor.artifact.identity import base_identity
from compressor.usable_cpus import product_threads
from compressor.usable_memory import usable_memory_bytes
from server.deltas.background import background_pool
from server.deltas.loader import decode_threads
from server.deltas.registry import DeltaRegistry, RegisteredDelta
from server.deltas.slots import Slot
from server.engine.catalog import VariantCatalog
from server.engine.core import EngineCore, Events
from server.engine.memory import with_kv_cache
from server.engine.observer import CoreStats, Observer
from server.engine.output import RequestOutput, TextOutput
from server.engine.request import Request
from server.engine.schedule.pages import PagePool
from server.engine.single_flight import SingleFlight
from server.engine.step.runner import Runner
from server.engine.step.static_step import BUCKETS
from server.engine.text import load_base_text
from server.engine.types import Generation, ModelInfo, SamplingParams, VariantState
from server.engine.variant import Variant
from server.errors import ConfigError, Draining, InvalidRequest
from server.model.base import BaseModel, load_base_model
from server.ops.precision import host_cpu, name_of
from server.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")


class LLMEngine:
    """Create with `from_settings` (loads the base), then `start` inside the event loop."""

    def __init__(
        self,
        settings: Settings,
        base: BaseModel,
        catalog: VariantCatalog,
        observer: Observer | None = None,
    ) -> None:
        settings = with_kv_cache(settings, base.device)
        self._settings = settings
        self._base = base
        self._catalog = catalog
        self.base_name = catalog.base_name
        pages = allocate_pages(base, settings)
        # A request must fit into the cache alone, or it could never run.
        self.max_model_len = min(
            settings.max_model_len or base.max_len, pages.n_pages * pages.page_tokens
        )
        runner = Runner(base)
        self._choose_steps(runner)
        self.core = EngineCore(runner, settings, pages, catalog.job_for, self._publish, observer)
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="text")
        # Their own: a template that hangs must not keep others from tokenising.
        self._templates = ThreadPoolExecutor(2, thread_name_prefix="template")
        # Their own, of low priority: who opens a variant must not keep others from tokenising.
        self._openers = background_pool(2, "opener")
        self._openings: SingleFlight[Variant] = SingleFlight(self._openers)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = False

    def _choose_steps(self, runner: Runner) -> None:
        """CUDA graphs for decode steps, where the device and the kernels have them."""
        base, settings = self._base, self._settings
        if base.device.type != "cuda" or settings.enforce_eager:
            return
        if not base.kernels.takes_data(base.device):
            log.warning("no CUDA graphs with the %s kernels: decoding is slower", base.kernels.name)
            return
        max_rows = min(settings.max_num_seqs, BUCKETS[-1])
        runner.use_static(max_rows=max_rows, max_len=self.max_model_len)
        runner.capture()

    @classmethod
    def from_settings(cls, settings: Settings, observer: Observer | None = None) -> Self:
        """Load the base and register the deltas. Raises ConfigError."""
        if not settings.base.is_dir():
            raise ConfigError("the base is not a directory; give a Hugging Face model directory")
        if settings.deltas is not None and not settings.deltas.is_dir():
            raise ConfigError("the deltas path is not a directory")
        threads = product_threads(settings.torch_threads)
        if torch.get_num_threads() != threads.count:  # setting it starts a pool nobody uses
            torch.set_num_threads(threads.count)
        base = load_base_model(
            settings.base,
            _device(settings),
            _dtype(settings),
            settings.kernels,
            None if settings.base_quant == "none" else settings.base_quant,
            widened_budget_bytes=_widened_budget(settings),
        )
        products = f"{host_cpu().description}; products in {name_of(base.dtype)}; "
        log.info("CPU: %s%s", products if base.device.type == "cpu" else "", threads)
        if settings.max_model_len is not None and settings.max_model_len > base.max_len:
            raise ConfigError(
                f"max_model_len is {settings.max_model_len}, but the base model has positions for "
                f"{base.max_len} tokens only; lower it"
            )
        name = settings.served_base_name or settings.base.resolve().name
        identity = base_identity(settings.base)
        registry = DeltaRegistry(settings.deltas, identity, reserved=frozenset({name}))
        registry.rescan()
        catalog = VariantCatalog(
            settings,
            registry,
            name,
            identity,
            load_base_text(settings.base),
            base.vocab_size,
            read_threads=decode_threads(base.device),
        )
        return cls(settings, base, catalog, observer)

    def start(self) -> None:
        """Start the engine thread; events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.core.start()
        self._started = True

    async def shutdown(self, drain_timeout_s: float) -> None:
        """Refuse new requests, let running ones finish, fail the rest, stop the thread."""
        self.core.begin_drain()
        deadline = asyncio.get_running_loop().time() + drain_timeout_s
        while self.core.n_open and not self.core.dead:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.core.stop)
        for pool in (self._workers, self._templates, self._openers):
            pool.shutdown(wait=False, cancel_futures=True)

    # -- names -----------------------------------------------------------------------------------

    def models(self) -> Sequence[ModelInfo]:
        stats = self.core.stats()
        resident = {key: slot for key, slot in stats.resident.items() if slot.ready}
        infos = [
            ModelInfo(
                self.base_name, None, None, "ready", self._catalog.created_s, self.max_model_len
            )
        ]
        for delta in self._catalog.registry.all():
            key = self._catalog.key_of(delta)
            merged_bytes = stats.merged_bytes.get(key, 0)
            infos.append(self._info(delta, key, resident.get(key), merged_bytes))
        return infos

    def _info(
        self, delta: RegisteredDelta, key: str, slot: Slot | None, merged_bytes: int
    ) -> ModelInfo:
        error = delta.error or self._catalog.load_error(key) or self.core.loader.errors.get(key)
        return ModelInfo(
            name=delta.name,
            parent=self.base_name,
            digest=delta.digest or None,
            state=self._state(key, slot, error),
            created_s=delta.created_s,
            max_model_len=self.max_model_len,
            n_bytes=delta.n_bytes,
            resident_bytes=0 if slot is None else slot.n_bytes,
            reconstructed_bytes=merged_bytes,
            mode=self._catalog.mode_of(delta.name),
            codec=delta.codec,
            error=error,
            fidelity=dict(delta.fidelity),
        )

    def _state(self, key: str, slot: Slot | None, error: str | None) -> VariantState:
        if slot is not None:
            return "ready"
        if self.core.loader.is_loading(key):
            return "loading"
        return "failed" if error else "registered"

    async def open(self, model: str) -> Variant:
        """See EngineClient. An artifact's configuration and text files are read on a thread of
        their own, once for all who ask meanwhile; its weights when the engine needs them.
        """
        if self.core.draining:
            raise Draining("the server is shutting down", retry_after_s=5)
        known = self._catalog.cached(model)
        if known is not None:
            return known
        return await self._openings.run(model, lambda: self._catalog.open(model))

    def rescan(self) -> None:
        self._catalog.rescan()

    # -- text ------------------------------------------------------------------------------------

    async def encode(self, variant: Variant, text: str) -> list[int]:
        return await self._in_thread(lambda: variant.text.encode(text))

    async def decode(self, variant: Variant, token_ids: Sequence[int]) -> str:
        return await self._in_thread(lambda: variant.text.decode(list(token_ids)))

    async def render_chat(
        self,
        variant: Variant,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        rendering = asyncio.get_running_loop().run_in_executor(
            self._templates,
            lambda: variant.text.render_chat(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            ),
        )
        try:
            return await asyncio.wait_for(rendering, self._settings.template_timeout_s)
        except TimeoutError as error:
            raise InvalidRequest(
                "rendering the chat template took too long", param="messages"
            ) from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    # -- generation ------------------------------------------------------------------------------

    def generate(
        self,
        variant: Variant,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        on_output: Callable[[], None],
        deadline_s: float | None = None,
        cache_salt: str = "",
    ) -> Generation:
        """See EngineClient."""
        self._check(variant, prompt_ids, params)
        timeout_s = self._settings.request_timeout_s if deadline_s is None else deadline_s
        output = RequestOutput(
            TextOutput(variant.text, params), on_output, abort=lambda: self.core.abort(request)
        )
        request = Request(
            # Clients choose request ids; inside the engine they must be unique.
            request_id=f"{request_id}-{uuid.uuid4().hex}",
            variant=variant,
            prompt_ids=list(prompt_ids),
            params=params,
            deliver=output.receive,
            deadline=time.monotonic() + timeout_s,
            cache_salt=cache_salt,
        )
        self.core.submit(request)
        return output

    def _check(self, variant: Variant, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if min(prompt_ids) < 0 or max(prompt_ids) >= variant.vocab_size:
            raise InvalidRequest(
                f"token ids must lie within 0..{variant.vocab_size - 1}", param="prompt"
            )
        longest = self.max_model_len
        total = len(prompt_ids) + params.max_tokens
        if total > longest:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens and max_tokens is {params.max_tokens}: "
                f"together they exceed the {longest} tokens this server can hold per request",
                param="max_tokens",
            )
        bias_ids = [token for token, _ in params.logit_bias]
        ids = [*bias_ids, *params.stop_token_ids]
        if ids and (min(ids) < 0 or max(ids) >= variant.vocab_size):
            raise InvalidRequest(
                f"token ids in logit_bias and stop_token_ids must lie within "
                f"0..{variant.vocab_size - 1}",
                param="logit_bias" if bias_ids else "stop_token_ids",
            )

    def _publish(self, events: Events) -> None:
        """Engine thread: hand a whole step's events to the event loop at once."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, events)

    # -- health ----------------------------------------------------------------------------------

    def stats(self) -> CoreStats:
        return self.core.stats()

    def is_alive(self) -> bool:
        """Whether the loop lives. It beats once per layer, not only once per step: a long prompt
        on a slow machine is no hang, a kernel that never returns is one after
        `Settings.heartbeat_timeout_s`.
        """
        return self._started and self.core.is_alive(self._settings.heartbeat_timeout_s)

    def is_dead(self) -> bool:
        return self.core.dead

    def is_ready(self) -> bool:
        return self.is_alive() and not self.core.draining


def _deliver(events: Events) -> None:
    for request, event in events:
        request.deliver(event)


def _device(settings: Settings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda but torch sees no GPU; use --device cpu")
    return torch.device(settings.device)


def _widened_budget(settings: Settings) -> int:
    """Half of what this process may use, unless the settings say."""
    if settings.widened_weights_bytes is not None:
        return settings.widened_weights_bytes
    return usable_memory_bytes() // 2


def _dtype(settings: Settings) -> torch.dtype | None:
    names = {
        "auto": None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return names[settings.dtype]


def allocate_pages(base: BaseModel, settings: Settings) -> PagePool:
    """Reserve the KV cache. Raises ConfigError if it cannot hold one request of a page."""
    page_bytes = base.store.bytes_per_token() * settings.kv_block_tokens
    assert settings.kv_cache_bytes is not None, "see `with_kv_cache`"
    n_pages = settings.kv_cache_bytes // page_bytes
    if n_pages < 2:
        raise ConfigError(
            f"kv_cache_bytes is {settings.kv_cache_bytes}, but two pages of "
            f"{settings.kv_block_tokens} tokens need {2 * page_bytes} bytes"
        )
    # One more, which nobody is given: padding rows of static steps write there.
    base.store.allocate(n_pages + 1, settings.kv_block_tokens, base.device)
    return PagePool(n_pages, settings.kv_block_tokens, reuse=settings.prefix_cache)
