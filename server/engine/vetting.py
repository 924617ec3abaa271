"""Nobody is served by a variant that answers as the base does, or below the floor asked for.

When a variant with a certificate is first opened, a prompt of it where delta and base differ is
scored on the live engine, as a request like any other beside those that run, and who asked for the
variant waits for that. It is done once for each digest and mode.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from typing import Any

from compressor.artifact.certificate import Certificate, GoldenPrompt
from server.deltas.failures import Failed, Failure
from server.engine.replay import (
    Replayed,
    agreement,
    comparison,
    default_floor,
    is_base,
    most_telling,
    replayed,
)
from server.engine.types import Generation, OutputChunk, SamplingParams
from server.engine.variant import Variant
from server.errors import InvalidRequest, ServeError
from server.tenants.principal import ANYBODY, Principal

log = logging.getLogger(__name__)
SALT = "certificate"  # its prompts share no cached prefix with anybody's
_REPLACE = "an operator must rescan, or compress or copy it again"
_UNFIT = "a prompt of its certificate cannot be run here"
_SHORTER = "an operator must certify it with other prompts, or allow a longer context"
_SCORE = SamplingParams(max_tokens=0, temperature=0.0, logprobs=1, prompt_logprobs=True)

Generate = Callable[..., Generation]


class Vetter:
    """Event loop only, but for `keep` and `reason`.

    read      an artifact's certificate; runs on a thread of `pool`
    generate  as `EngineClient.generate`
    floor     agreement that a variant must reach before it is served, if one is asked for
    """

    def __init__(
        self,
        read: Callable[[Variant], Certificate | None],
        generate: Generate,
        pool: Executor,
        floor: float | None = None,
    ) -> None:
        self._read = read
        self._generate = generate
        self._pool = pool
        self._floor = floor
        self._trusted: frozenset[str] = frozenset()
        self._failures: dict[str, Failure] = {}
        self._flights: dict[str, asyncio.Task[None]] = {}

    def failed(self) -> Collection[str]:
        """Keys of the variants that were found wanting."""
        return self._failures.keys()

    def reason(self, key: str) -> str | None:
        """Why a variant is not served, if it was found wanting; safe to show."""
        failure = self._failures.get(key)
        return None if failure is None else failure.reason

    def keep(self, keys: Collection[str]) -> None:
        """Forget all variants but these; what was found wanting is looked at again."""
        self._trusted = self._trusted.intersection(keys)
        self._failures = {}

    async def vet(self, variant: Variant, principal: Principal = ANYBODY) -> None:
        """Return once the variant may be served. Raises DeltaBroken if it may not, and what a
        request of this principal would.
        """
        while variant.origin is not None and variant.key not in self._trusted:
            if (failure := self._failures.get(variant.key)) is not None:
                raise failure.error_for(variant.name)
            flight, is_own = self._flights.get(variant.key), False
            if flight is None:
                flight, is_own = asyncio.create_task(self._look(variant, principal)), True
                self._flights[variant.key] = flight
                flight.add_done_callback(lambda task: self._landed(variant.key, task))
            try:
                await asyncio.shield(flight)
            except ServeError:  # another tenant's limits say nothing of this one's
                if is_own or variant.key in self._failures:
                    raise

    async def verify(self, variant: Variant) -> dict[str, Any]:
        """Replay the whole certificate; see `EngineClient.verify`."""
        certificate = await self._certificate(variant)
        if certificate is None:
            raise InvalidRequest(
                f"`{variant.name}` has no certificate; add one with impart certify.",
                param="model",
            )
        try:
            found = [
                await self._replay(variant, one, ANYBODY, free=True) for one in certificate.prompts
            ]
        except InvalidRequest as error:
            raise InvalidRequest(f"{_UNFIT}: {error.message}", param="model") from error
        self._settle(variant, self._failure(certificate, found))
        floor = default_floor(certificate) if self._floor is None else self._floor
        return comparison(certificate, found, floor)

    async def _look(self, variant: Variant, principal: Principal) -> None:
        certificate = await self._certificate(variant)
        failure, prompts = None, list[GoldenPrompt]()
        if certificate is not None and self._floor is not None:
            prompts = list(certificate.prompts)
        elif certificate is not None and (canary := most_telling(certificate)) is not None:
            prompts = [canary]
        elif self._floor is not None:
            failure = Failure(
                "it has no certificate, and this server verifies variants before it serves them",
                "an operator must add one with impart certify",
            )
        if certificate is not None and prompts:
            try:
                found = [await self._replay(variant, one, principal) for one in prompts]
                failure = self._failure(certificate, found)
            except InvalidRequest as error:
                failure = Failure(f"{_UNFIT}: {error.message}", _SHORTER)
        self._settle(variant, failure)
        if failure is not None:
            raise failure.error_for(variant.name)

    def _failure(self, certificate: Certificate, found: Sequence[Replayed]) -> Failure | None:
        if is_base(found):
            return Failure(
                "it answers a prompt of its certificate as the base does, not as it should",
                _REPLACE,
            )
        reached = agreement(found)
        if self._floor is not None and reached < self._floor:
            return Failure(
                f"it agrees with its fine-tune in {reached:.1%} of the certificate's tokens "
                f"({certificate.top1_agreement:.1%} when it was made), below the floor of "
                f"{self._floor:.1%}",
                _REPLACE,
            )
        return None

    def _settle(self, variant: Variant, failure: Failure | None) -> None:
        if failure is None:
            self._failures = {k: f for k, f in self._failures.items() if k != variant.key}
            self._trusted |= {variant.key}
        else:
            log.error("the variant %s is not served: %s", variant.name, failure.reason)
            self._failures = self._failures | {variant.key: failure}
            self._trusted -= {variant.key}

    def _landed(self, key: str, flight: asyncio.Task[None]) -> None:
        self._flights.pop(key)
        if not flight.cancelled():
            flight.exception()  # whoever asked may have gone

    async def _certificate(self, variant: Variant) -> Certificate | None:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._read, variant)
        except Failed as error:
            raise error.failure.error_for(variant.name) from error

    async def _replay(
        self, variant: Variant, golden: GoldenPrompt, principal: Principal, *, free: bool = False
    ) -> Replayed:
        scored = await self._run(variant, (*golden.prompt, *golden.tokens), _SCORE, principal)
        if not free:
            return replayed(golden, scored.prompt_logprobs)
        params = SamplingParams(max_tokens=len(golden.tokens), temperature=0.0, ignore_eos=True)
        written = await self._run(variant, golden.prompt, params, principal)
        return replayed(golden, scored.prompt_logprobs, written.token_ids)

    async def _run(
        self, variant: Variant, ids: Sequence[int], params: SamplingParams, principal: Principal
    ) -> OutputChunk:
        """One request to its end."""
        news, chunks = asyncio.Event(), list[OutputChunk]()
        generation = self._generate(
            variant,
            ids,
            params,
            request_id=SALT,
            on_output=news.set,
            cache_salt=SALT,
            principal=principal,
        )
        try:
            while not chunks or chunks[-1].finish_reason is None:
                await news.wait()
                news.clear()
                chunks += generation.take()
                if generation.error is not None:
                    raise generation.error
        finally:
            generation.close()
        return OutputChunk.joined(chunks)
