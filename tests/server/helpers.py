"""An engine core without HTTP or asyncio: submit, step until done, read the events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.artifact.identity import base_identity
from server.deltas.registry import DeltaRegistry
from server.engine.catalog import VariantCatalog
from server.engine.core import EngineCore, Events
from server.engine.llm_engine import allocate_pages
from server.engine.output import RequestOutput, TextOutput
from server.engine.request import Event, Request
from server.engine.step.runner import Runner
from server.engine.text import load_base_text
from server.engine.types import OutputChunk, SamplingParams
from server.model.base import load_base_model
from server.settings import Settings

STEP_TIMEOUT_S = 60.0
STATIC_LEN = 512  # tokens a sequence may have in static steps


@dataclass(eq=False)
class Recorded:
    """A request and what it received."""

    request: Request
    output: RequestOutput
    events: list[Event] = field(default_factory=list)  # of the engine
    chunks: list[OutputChunk] = field(default_factory=list)  # for the client

    def take(self, event: Event) -> None:
        self.events.append(event)
        self.output.receive(event)

    @property
    def output_ids(self) -> list[int]:
        return self.request.tokens[len(self.request.prompt_ids) :]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def error(self) -> Exception | None:
        return self.output.error

    @property
    def done(self) -> bool:
        return self.error is not None or any(c.finish_reason is not None for c in self.chunks)


class CoreHarness:
    """Drives `EngineCore.step` on the test's own thread: deterministic, nothing to wait for but
    the loader's workers.
    """

    def __init__(
        self, base: Path, deltas: Path | None = None, *, static: bool = False, **settings: Any
    ) -> None:
        fields = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 8 << 20} | settings
        self.settings = Settings(base=base, deltas=deltas, **fields)
        kernels = self.settings.kernels
        quant = None if self.settings.base_quant == "none" else self.settings.base_quant
        dtype = getattr(torch, self.settings.dtype)
        device = torch.device(self.settings.device)
        model = load_base_model(base, device, dtype, kernels, quant)
        identity = base_identity(base)
        registry = DeltaRegistry(deltas, identity, frozenset({"base"}))
        registry.rescan()
        self.catalog = VariantCatalog(
            self.settings, registry, "base", identity, load_base_text(base), model.vocab_size
        )
        pages = allocate_pages(model, self.settings)
        runner = Runner(model)
        if static:
            runner.use_static(max_rows=self.settings.max_num_seqs, max_len=STATIC_LEN)
            for layer in model.store.layers.values():  # the page that padding writes to
                layer.k[-1] = layer.v[-1] = float("nan")
        self.core = EngineCore(runner, self.settings, pages, self.catalog.job_for, self._deliver)
        self.n_free_at_start = pages.n_free
        self._count = 0

    @staticmethod
    def _deliver(events: Events) -> None:
        for request, event in events:
            request.deliver(event)

    def submit(
        self,
        model: str,
        prompt: str | list[int],
        *,
        deadline: float | None = None,
        cache_salt: str = "",
        **params: Any,
    ) -> Recorded:
        """Queue a request; greedy, 16 tokens unless `params` say otherwise."""
        variant = self.catalog.open(model)
        ids = variant.text.encode(prompt) if isinstance(prompt, str) else prompt
        chosen = SamplingParams(**({"max_tokens": 16, "temperature": 0.0} | params))
        self._count += 1
        output = RequestOutput(
            TextOutput(variant.text, chosen),
            on_output=lambda: recorded.chunks.extend(output.take()),
            abort=lambda: self.core.abort(request),
        )
        request = Request(
            request_id=f"r{self._count}",
            variant=variant,
            prompt_ids=ids,
            params=chosen,
            deliver=lambda event: recorded.take(event),
            deadline=deadline,
            cache_salt=cache_salt,
        )
        recorded = Recorded(request, output)
        self.core.submit(request)
        return recorded

    def until(self, condition: Callable[[], bool]) -> None:
        """Step until the condition holds."""
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError("it did not come true")
            self.core.turn()

    def run(self, *recorded: Recorded) -> None:
        """Step until all given requests have ended."""
        self.until(lambda: all(r.done for r in recorded))

    def assert_idle(self) -> None:
        """No page, slot reference or request is left behind."""
        if not self.core._inbox.empty():  # aborts after stop strings
            self.core.turn()
        while self.core._lookahead.in_flight is not None:
            self.core.turn()
        stats = self.core.stats()
        assert stats.n_free_pages == self.n_free_at_start
        assert (stats.n_running, stats.n_waiting, self.core.n_open) == (0, 0, 0)
        assert all(slot.refs == 0 for slot in stats.resident.values())

    def close(self) -> None:
        self.core.reconstructor.close()
        self.core.loader.close()
