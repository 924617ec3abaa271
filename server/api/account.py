"""What one generation request has used, in true counts: for its log line, and for the ledger.

`GenerationResponse` fills the account while it answers; `LedgerRecorder` makes a row of it when the
answer has ended, however it did. A request that is refused before has an empty one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.fanout import Timed
from server.api.middleware import STATUS, generates
from server.api.sse import Stalled
from server.engine.types import SamplingParams, VariantHandle
from server.ledger.records import RequestRow
from server.tenants.principal import ANYBODY, Principal

if TYPE_CHECKING:  # SQLAlchemy is imported where there is a ledger only
    from server.ledger.ledger import Ledger

CLIENT_LEFT = 499  # nginx's status for it: no client ever sees it
WORST_FIRST = ("error", "abort", "length", "stop")  # of several choices the first of these counts


@dataclass(slots=True)
class Account:
    """Belongs to one request, on the event loop.

    prompts   for each prompt its tokens and its choices
    sampling  how the first choice is sampled
    """

    model: str = ""
    digest: str = ""
    failed: bool = False  # by an error, also one that a stream told as its last event
    prompts: list[tuple[int, list[Timed]]] = field(default_factory=list)
    sampling: SamplingParams | None = None

    def opened(self, variant: VariantHandle, prompt_lengths: Iterable[int]) -> None:
        """The request's variant is known and its prompts are tokens."""
        self.model, self.digest = variant.name, variant.digest or ""
        self.prompts = [(length, []) for length in prompt_lengths]

    def began(self, prompt: int, choice: Timed) -> None:
        """A choice of the prompt of this index is in the engine."""
        self.prompts[prompt][1].append(choice)

    @property
    def choices(self) -> list[Timed]:
        return [choice for _, choices in self.prompts for choice in choices]

    @property
    def prompt_tokens(self) -> int:
        return sum(_n_computed(length, choices) for length, choices in self.prompts)

    @property
    def cached_tokens(self) -> int:
        firsts = (choices[0] for _, choices in self.prompts if choices)
        return sum(choice.n_cached for choice in firsts)

    @property
    def output_tokens(self) -> int:
        return sum(choice.n_tokens for choice in self.choices)

    @property
    def used_tokens(self) -> int:
        """What counts against the tenant's limits."""
        return self.prompt_tokens + self.output_tokens

    @property
    def queue_s(self) -> float | None:
        """How long the engine's queue held the choice that began first."""
        return min((c.queue_s for c in self.choices if c.queue_s is not None), default=None)

    @property
    def first_token_at(self) -> float | None:
        return min((c.first_at for c in self.choices if c.first_at is not None), default=None)

    def finish_reason(self, status: int) -> str:
        """How the whole request ended, whose answer has this status."""
        reasons = {choice.finish_reason for choice in self.choices}
        if status == CLIENT_LEFT:
            reasons.add("abort")
        elif not reasons and (400 <= status < 500 or status == 503):
            return "refused"
        elif status >= 400:
            reasons.add("error")
        if self.failed:
            reasons.add("error")
        return next((reason for reason in WORST_FIRST if reason in reasons), "error")


def account_of(scope: Scope) -> Account:
    """Return the account of the request, whoever asks first."""
    return cast(Account, scope.setdefault("impart.account", Account()))


class LedgerRecorder:
    """Writes a row into the ledger for each generation request, when its answer has ended.

    Behind the authentication, because whoever has no key has no row, and before all else that
    refuses: what is refused has one, without tokens.
    """

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        self._app = app
        self._ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not generates(scope):
            await self._app(scope, receive, send)
            return
        account, unsent = account_of(scope), CLIENT_LEFT
        try:
            await self._app(scope, receive, send)
        except Stalled:  # the client is to blame
            raise
        except Exception:
            account.failed = True
            unsent = 500  # which `RequestContext` answers
            raise
        finally:
            self._ledger.add(_row(scope, account, scope.get(STATUS, unsent)))


def _row(scope: Scope, account: Account, status: int) -> RequestRow:
    principal: Principal = scope.get("impart.principal", ANYBODY)
    arrived: float = scope["impart.arrived"]
    first_at = account.first_token_at
    return RequestRow(
        ended_s=time.time(),
        request_id=scope["impart.request_id"],
        tenant=principal.tenant,
        key_id=principal.key_id,
        model=account.model,
        digest=account.digest,
        prompt_tokens=account.prompt_tokens,
        cached_tokens=account.cached_tokens,
        output_tokens=account.output_tokens,
        queue_s=account.queue_s,
        first_token_s=None if first_at is None else first_at - arrived,
        total_s=time.monotonic() - arrived,
        finish_reason=account.finish_reason(status),
        status=status,
    )


def _n_computed(length: int, choices: Sequence[Timed]) -> int:
    """Tokens of a prompt that were worked on: all once a choice has got something."""
    if any(choice.queue_s is not None for choice in choices):
        return length
    return max((choice.n_prompt_computed for choice in choices), default=0)
