"""A deterministic engine for tests of the HTTP layer.

Tokens are the bytes of the text. Each model writes its own letter followed by digits, so that an
answer from the wrong model is visible: base `0`, alpha `A`, beta `B`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from server.engine.limits import check_request
from server.engine.schedule.admission import Admission, AdmissionTicket
from server.engine.types import (
    EngineStats,
    ModelInfo,
    OutputChunk,
    SamplingParams,
    TenantUse,
    TextWorkerStats,
    TokenLogprob,
)
from server.errors import (
    DeltaBroken,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    ServeError,
)
from server.tenants.principal import ANYBODY, NOBODY, Principal
from tests.server.api.fake_variants import FakeVariants

BASE = "tiny-base"
LETTERS = {BASE: "0", "alpha": "A", "beta": "B"}
VOCAB = 300  # bytes, then ids that decode to nothing


@dataclass(frozen=True)
class FakeVariant:
    name: str
    digest: str | None
    fingerprint: str
    vocab_size: int = VOCAB
    chars_per_token: int = 256
    defaults: dict[str, Any] = field(default_factory=dict)


class FakeGeneration:
    """Fills itself from an iterator. As in the real one, a slow reader does not stop it."""

    def __init__(
        self,
        tokens: AsyncIterator[OutputChunk],
        on_output: Callable[[], None],
        ended: Callable[[bool], None],
        n_prompt_computed: int,
    ) -> None:
        self.error: Exception | None = None
        self.n_prompt_computed = n_prompt_computed
        self._pending: list[OutputChunk] = []
        self._on_output = on_output
        self._done = False
        self._task = asyncio.create_task(self._fill(tokens))
        self._task.add_done_callback(lambda _: ended(self._done))

    async def _fill(self, tokens: AsyncIterator[OutputChunk]) -> None:
        try:
            async for chunk in tokens:
                self._pending.append(chunk)
                self._done = chunk.finish_reason is not None
                self._on_output()
        except Exception as error:
            self._done = isinstance(error, ServeError)
            self.error = error
            self._on_output()

    def take(self) -> list[OutputChunk]:
        taken, self._pending = self._pending, []
        return taken

    def close(self) -> None:
        self._task.cancel()


class FakeEngine:
    """Knobs: delay_s per token, hold (an Event that must be set before each token after the
    first `hold_after`), fail_at (token number that raises `error`), waited_s (how long each
    sequence says that it waited until it ran), n_cached and n_prompt_computed (what each says of
    its prompt's tokens)."""

    base_name = BASE
    names: Any = None  # registering variants is tested with the real engine

    def __init__(self, max_model_len: int = 512, max_open: int = 320) -> None:
        self.max_model_len = max_model_len
        self.admission = Admission(max_waiting=max_open, max_running=0)
        self.variants = FakeVariants()
        self.waited_s = 0.0
        self.n_cached = 0
        self.n_prompt_computed = 0
        self.delay_s = 0.0
        self.hold: asyncio.Event | None = None
        self.hold_after = 0
        self.fail_at: int | None = None
        self.error: ServeError = GenerationFailed("It failed.")
        self.defaults: dict[str, dict[str, Any]] = {}
        self.open_error: ServeError | None = None
        self.alive = True
        self.rescans = 0
        self.pinned: list[dict[str, list[str]]] = []
        self.n_active = 0
        self.n_encoded = 0
        self.use: dict[str, TenantUse] = {}
        self.text_tenants: list[str] = []  # whose each text was
        self.special: list[bool] = []  # whether each encoding added special tokens
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.params: list[SamplingParams] = []
        self.prompts: list[list[int]] = []
        self.salts: list[str] = []
        self.principals: list[Principal] = []
        self.priorities: list[int] = []
        self.deadlines: list[float | None] = []

    # -- process

    def start(self) -> None: ...

    async def shutdown(self, drain_timeout_s: float) -> None:
        self.drain()

    def stats(self) -> EngineStats:
        return EngineStats(
            n_running=self.n_active,
            n_waiting=0,
            kv_block_tokens=16,
            n_kv_blocks=10,
            n_free_kv_blocks=10,
            n_preemptions=0,
            n_prefix_queried=0,
            n_prefix_hit=0,
            base_bytes=0,
            n_static_steps=0,
            n_eager_decode_steps=0,
            kernel_state="compiled",
        )

    def text_workers(self) -> TextWorkerStats:
        return TextWorkerStats(n_busy=1, n_waiting=0, n_kills={"cpu": 2})

    def tenant_use(self) -> dict[str, TenantUse]:
        return dict(self.use)

    def is_alive(self) -> bool:
        return self.alive

    def is_ready(self) -> bool:
        return self.alive and not self.admission.draining

    def rescan(self) -> None:
        self.rescans += 1

    async def pin(self, pinned: Mapping[Principal, Collection[str]]) -> None:
        self.pinned.append({p.tenant: list(names) for p, names in pinned.items()})

    # -- names

    def model(self, name: str) -> ModelInfo | None:
        return next((info for info in self.models() if info.is_named(name)), None)

    def models_at_work(self) -> Sequence[ModelInfo]:
        return [info for info in self.models() if info.parent is not None]

    def models(self) -> Sequence[ModelInfo]:
        infos = [ModelInfo(BASE, None, None, "ready", 1, self.max_model_len)]
        for name in ("alpha", "beta"):
            digest = name[0] * 64
            infos.append(
                ModelInfo(
                    name, BASE, digest, "ready", 1, self.max_model_len, 1000, 500, codec="blockdiag"
                )
            )
        infos.append(ModelInfo("broken", BASE, "d" * 64, "failed", 1, 0, error="Corrupt"))
        return infos

    async def verify(self, model: str) -> dict[str, Any]:
        variant = await self.open(model)
        if variant.digest is None:
            raise InvalidRequest("`tiny-base` has no certificate.", param="model")
        return {"digest": variant.digest, "verdict": "faithful"}

    async def open(self, model: str, principal: Principal = ANYBODY) -> FakeVariant:
        await asyncio.sleep(0)
        if self.open_error is not None:
            raise self.open_error
        name = model if model == BASE else model.removeprefix(f"{BASE}:")
        if name == "broken":
            raise DeltaBroken("`broken` cannot be served.", param="model")
        if name not in LETTERS:
            raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
        digest = None if name == BASE else name[0] * 64
        suffix = "base" if digest is None else digest[:12]
        return FakeVariant(
            name, digest, f"impart-fake-{suffix}", defaults=self.defaults.get(name, {})
        )

    # -- text

    async def encode(
        self,
        variant: FakeVariant,
        text: str,
        *,
        add_special_tokens: bool = True,
        tenant: str = NOBODY,
    ) -> list[int]:
        self.n_encoded += 1
        self.text_tenants.append(tenant)
        self.special.append(add_special_tokens)
        return list(text.encode())

    async def decode(
        self, variant: FakeVariant, token_ids: Sequence[int], *, is_whole: bool = True
    ) -> str:
        data = bytes(i for i in token_ids if i < 256)
        return data.decode("utf-8", "replace" if is_whole else "ignore")

    async def token_texts(self, variant: FakeVariant, token_ids: Sequence[int]) -> list[str]:
        return [await self.decode(variant, [token]) for token in token_ids]

    async def render_chat(
        self,
        variant: FakeVariant,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tenant: str = NOBODY,
    ) -> list[int]:
        if any(m["content"] == "template fails" for m in messages):
            raise InvalidRequest("the template refuses this", param="messages")
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        if continue_final_message:
            text = text[:-1]
        if add_generation_prompt:
            text += "<assistant>"
        return await self.encode(
            variant, text, add_special_tokens=add_special_tokens, tenant=tenant
        )

    # -- generation

    def check_open(self, principal: Principal = ANYBODY) -> None:
        self.admission.check(principal)

    def admit(self, n_sequences: int, principal: Principal = ANYBODY) -> AdmissionTicket:
        return self.admission.admit(n_sequences, principal)

    def drain(self) -> None:
        self.admission.drain()
        self.variants.feed.close()

    def generate(
        self,
        variant: FakeVariant,
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
    ) -> FakeGeneration:
        check_request(
            prompt_ids, params, vocab_size=variant.vocab_size, max_model_len=self.max_model_len
        )
        own = self.admission.admit(1, principal) if ticket is None else nullcontext(ticket)
        with own as admitted:
            admitted.hand_over(lambda: None)
        self.deadlines.append(deadline)
        self.params.append(params)
        self.salts.append(cache_salt)
        self.principals.append(principal)
        self.priorities.append(priority)
        self.prompts.append(list(prompt_ids))
        self.n_active += 1
        tokens = self._tokens(variant, prompt_ids, params)

        def ended(done: bool) -> None:
            self.n_active -= 1
            self.admission.leave(self.waited_s, principal)
            (self.finished if done else self.aborted).append(request_id)

        return FakeGeneration(tokens, on_output, ended, self.n_prompt_computed)

    async def _tokens(
        self, variant: FakeVariant, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[OutputChunk]:
        text = ""
        first = self._prompt_logprobs(prompt_ids, params)
        if params.max_tokens == 0:
            yield OutputChunk(
                "", (), prompt_logprobs=first, finish_reason="length", queue_s=self.waited_s
            )
            return
        for i in range(params.max_tokens):
            await asyncio.sleep(self.delay_s)
            if self.fail_at == i:
                raise self.error
            if self.hold is not None and i >= self.hold_after:
                await self.hold.wait()
            token = LETTERS[variant.name] if i % 5 == 0 else str(i % 10)
            text += token
            stopped = next((stop for stop in params.stop if text.endswith(stop)), None)
            last = i + 1 == params.max_tokens
            yield OutputChunk(
                "" if stopped else token,
                (ord(token),),
                logprobs=self._logprobs(token, params),
                prompt_logprobs=first if i == 0 else (),
                finish_reason="stop" if stopped else "length" if last else None,
                stop_reason=stopped,
                n_cached_tokens=self.n_cached,
                queue_s=self.waited_s,
            )
            if stopped:
                return

    def _logprobs(self, token: str, params: SamplingParams) -> tuple[TokenLogprob, ...]:
        if params.logprobs is None:
            return ()
        best = [(ord(token), token, -0.25), (ord("?"), "?", -1.5), (ord("!"), "!", float("-inf"))]
        top = tuple(
            TokenLogprob(i, value, (), text, text.encode())
            for i, text, value in best[: params.logprobs]
        )
        return (TokenLogprob(ord(token), -0.25, top, token, token.encode(), len(token)),)

    def _prompt_logprobs(
        self, ids: Sequence[int], params: SamplingParams
    ) -> tuple[TokenLogprob, ...]:
        if not params.prompt_logprobs:
            return ()
        first = TokenLogprob(ids[0], None, (), chr(ids[0]), bytes(ids[:1]), 1)
        rest = (self._logprobs(chr(i), params)[0] for i in ids[1:])
        return (first, *rest)
