"""The server's own engine on a random model: scheduler, graphs, sampler, loader; no HTTP, no text.

`Engine` drives `EngineCore` on this thread, one step a `turn`, as the server's engine thread does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.random_model import IDENTITY, random_base
from benchmarks.gpu.scope import Scope
from compressor.artifact.reader import Artifact, read_artifact
from server.deltas.loads import LoadDecoded, LoadJob
from server.deltas.staging import decode_threads, stage_variant
from server.engine.build import build_core
from server.engine.core import EngineCore
from server.engine.lifecycle import Events
from server.engine.request import Request
from server.engine.residents import holder_of
from server.engine.step.runner import Runner
from server.engine.types import SamplingParams
from server.engine.variant import BASE_KEY, Variant
from server.ops.kernels import Kernels
from server.ops.quantize import BaseQuant
from server.settings import Settings
from server.tenants.principal import ANYBODY
from server.text.assets import TextAssets

SPARE_STEPS = 1024  # that rows may live beside the timed ones: prefill of others, a load


def wordless() -> TextAssets:
    """What a random model has for text: nothing is read or written here but token ids."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = ByteLevel()
    return TextAssets(PreTrainedTokenizerFast(tokenizer_object=tokenizer), frozenset(), {})


@dataclass
class Engine:
    """See the module's docstring."""

    scope: Scope
    core: EngineCore
    runner: Runner
    readers: dict[str, Callable[[], Artifact]] = field(default_factory=dict)
    first_tokens: dict[str, float] = field(default_factory=dict)  # by request
    text: TextAssets = field(default_factory=wordless)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _count: int = 0

    def variant(self, key: str) -> Variant:
        return Variant(key, key, key, key, self.scope.shape.vocab, self.text)

    def submit(self, key: str, n_prompt: int) -> Request:
        """A greedy request of random tokens that ends by `abort`, or at the longest length."""
        self._count += 1
        name = f"r{self._count}"
        prompt = torch.randint(self.scope.shape.vocab, (n_prompt,), generator=self._generator)
        request = Request(
            name,
            self.variant(key),
            prompt.tolist(),
            SamplingParams(max_tokens=1 << 30, temperature=0.0, ignore_eos=True),
            deliver=lambda event: self._take(name, event),
        )
        self.core.submit(request)
        return request

    def _take(self, name: str, event: Any) -> None:
        if isinstance(event, Exception):
            raise event
        self.first_tokens.setdefault(name, time.perf_counter())

    def until(self, condition: Callable[[], bool]) -> float:
        """Seconds of turns until the condition holds."""
        start = time.perf_counter()
        while not condition():
            self.core.turn()
        return time.perf_counter() - start

    def start(
        self, rows: int, keys: Sequence[str], n_prompt: int | None = None
    ) -> tuple[list[Request], float]:
        """`rows` requests shared evenly by `keys`, all decoding, and the seconds of prefill.

        n_prompt  tokens of each, default the scope's context
        """
        keys = keys or [BASE_KEY]
        length = self.scope.context if n_prompt is None else n_prompt
        requests = [self.submit(keys[i * len(keys) // rows], length) for i in range(rows)]
        seconds = self.until(lambda: all(r.request_id in self.first_tokens for r in requests))
        return requests, seconds

    def end(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.core.abort(request)
        self.until(lambda: not self.core.n_open)

    def fill(self, artifact: Artifact, keys: Sequence[str]) -> None:
        """Make variants resident that share one artifact's values, not its memory: decoded once,
        then each through the loader's own way into a slot. Raises RuntimeError if one has failed.
        """
        base = self.runner.base
        job = LoadJob(keys[0], keys[0], "apply", lambda: artifact)
        parameters = stage_variant(artifact, base.parameters)
        n_bytes = sum(p.n_bytes for p in parameters)
        decoded = LoadDecoded(job, parameters, n_bytes, time.monotonic())
        errors = self.core.loader.errors
        for key in keys:
            own = LoadJob(key, key, "apply", job.read)
            self.core.loader.claims.want(key, [holder_of(ANYBODY)])
            self.core.loader.handle(replace(decoded, job=own))
            self.core.step()  # gives it a slot; a turn would first wait for something to do
            self.until(lambda key=key: self.is_ready(key) or key in errors)  # type: ignore[misc]
            if key in errors:
                raise RuntimeError(f"variant {key} of {keys[-1]} did not load: {errors[key]}")

    @property
    def version(self) -> int:
        """Rises whenever slot arrays have grown: see `Residency`."""
        return self.runner.base.residency.version

    def is_ready(self, key: str) -> bool:
        slot = self.core.slots.get(key)
        return slot is not None and slot.ready

    def read_from(self, key: str, path: Path) -> None:
        """Where the loader finds a variant that is not resident."""
        n_threads = decode_threads(self.scope.device)
        self.readers[key] = lambda: read_artifact(path, base_identity=IDENTITY, n_threads=n_threads)

    def job_for(self, variant: Variant) -> LoadJob:
        return LoadJob(variant.key, variant.name, "apply", self.readers[variant.key])


def make_engine(
    scope: Scope, base_quant: BaseQuant | None = None, kernels: Kernels | None = None
) -> Engine:
    """With room for all mixes of the scope and its loads; steps capture the graphs they need."""
    base = random_base(scope, base_quant, kernels)
    n_rows = max(rows for rows, _ in scope.mixes) + 1  # a row that asks for a cold variant
    longest = scope.context + 2 * scope.n_steps + SPARE_STEPS
    cache = n_rows * longest * base.store.bytes_per_token()
    settings = Settings(
        base=Path(),
        kv_cache_bytes=cache,
        delta_budget_bytes=1 << 40,
        max_resident_variants=max(scope.variants) + scope.n_loads,
        max_variants_per_step=max(scope.variants) + 1,
        max_num_seqs=n_rows,
        max_batch_tokens=scope.prefill_rows,
        max_model_len=longest,
        max_prefill_slowdown=0.0,
        prefix_cache=False,
    )
    engine: Engine

    def static_steps(runner: Runner, settings: Settings) -> None:
        runner.use_static(max_rows=n_rows, max_len=longest)

    def publish(events: Events) -> None:
        for request, event in events:
            request.deliver(event)

    parts = build_core(
        settings,
        base,
        lambda variant: engine.job_for(variant),
        publish,
        choose_steps=static_steps,
    )
    engine = Engine(scope, parts.core, parts.runner)
    return engine
