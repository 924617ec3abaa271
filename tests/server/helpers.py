"""An engine core without HTTP or asyncio: submit, step until done, read the events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.engine.build import build_engine
from server.engine.lifecycle import Events
from server.engine.output import RequestOutput, TextOutput
from server.engine.request import Event, Request
from server.engine.step.runner import Runner
from server.engine.types import OutputChunk, SamplingParams
from server.engine.variant import Variant
from server.ops.kernels import Kernels
from server.settings import Settings
from server.tenants.principal import ANYBODY, Principal
from server.text.encoding import Messages

STEP_TIMEOUT_S = 600  # a cold kernel cache on a busy machine; nothing is timed by it
MAX_TOKENS = 512  # of a prompt
STATIC_LEN = 512  # tokens a sequence may have in static steps
FIELDS = {
    "served_base_name": "base",
    "dtype": "float32",
    "device": "cpu",
    "kv_cache_bytes": 8 << 20,
    "compile_kernels": "wait",  # else a run with a cold cache would test torch's alone
    "self_check": False,  # `tests/server/engine/check` has its own; here it would cost each test
}


def _static_steps(runner: Runner, settings: Settings) -> None:
    """Decode steps over static buffers; what padding writes there is poison to whoever reads it."""
    runner.use_static(max_rows=settings.max_num_seqs, max_len=STATIC_LEN)
    for layer in runner.base.store.all_kv_blocks():  # the KV block that padding writes to
        layer.k[-1] = layer.v[-1] = float("nan")


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
        self,
        base: Path,
        deltas: Path | None = None,
        *,
        static: bool = False,
        kernels: Kernels | None = None,
        **settings: Any,
    ) -> None:
        """kernels: ready ones, instead of those that `settings` name."""
        fields = FIELDS | settings
        self.settings = Settings(base=base, deltas=deltas, **fields)
        parts = build_engine(
            self.settings,
            self._deliver,
            kernels=kernels,
            choose_steps=_static_steps if static else None,
        )
        self.catalog, self.core, self.text = parts.catalog, parts.core, parts.text
        self.swap = parts.swap
        self.max_model_len = parts.settings.max_model_len
        self.n_free_at_start = self.core.stats().n_free_kv_blocks
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
        principal: Principal = ANYBODY,
        **params: Any,
    ) -> Recorded:
        """Queue a request; greedy, 16 tokens unless `params` say otherwise."""
        variant = self.catalog.open(model)
        ids = self.encode(variant, prompt) if isinstance(prompt, str) else prompt
        chosen = SamplingParams(**({"max_tokens": 16, "temperature": 0.0} | params))
        self._count += 1
        output = RequestOutput(
            TextOutput(variant.text, chosen, ids),
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
            principal=principal,
        )
        recorded = Recorded(request, output)
        self.core.submit(request)
        return recorded

    def encode(self, variant: Variant, text: str) -> list[int]:
        """Tokenise as the engine does, for a test without an event loop."""
        return asyncio.run(self.text.encode(variant.text, text, MAX_TOKENS))

    def render(self, variant: Variant, messages: Messages, **options: bool) -> list[int]:
        """Render and tokenise a conversation as the engine does."""
        return asyncio.run(self.text.render_chat(variant.text, messages, MAX_TOKENS, **options))

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
        """No KV block, slot reference or request is left behind."""
        if not self.core._inbox.empty():  # aborts after stop strings
            self.core.turn()
        while self.core._lookahead.in_flight is not None:
            self.core.turn()
        stats = self.core.stats()
        assert stats.n_free_kv_blocks == self.n_free_at_start
        assert (stats.n_running, stats.n_waiting, self.core.n_open) == (0, 0, 0)
        assert all(slot.refs == 0 for slot in stats.resident.values())

    def close(self) -> None:
        self.core.reconstructor.close()
        self.core.loader.close()
        self.text.close()
