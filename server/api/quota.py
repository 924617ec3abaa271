"""A tenant's limits at the HTTP edge: requests are counted when they come, tokens when they are
known, and every answer says what is left, in OpenAI's headers.

Counted are the requests whose work a body asks for (`BODY_PATHS`), tokenising included; lists,
probes and usage are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.account import account_of
from server.api.errors import note_error, response_of
from server.api.middleware import BODY_PATHS
from server.api.prompts import Prompt
from server.api.reply import Reply
from server.engine.types import SamplingParams
from server.errors import ContextTooLong, InvalidRequest, ServeError
from server.tenants.limits import Limiter, Visit, duration
from server.tenants.tenant import EVERYBODY, TenantLimits

# Reserved for an answer whose length the request does not bound; it may become longer, and counts
# as what it was. The most that it may become, the rest of the context, would leave no room beside.
UNBOUNDED_ANSWER_TOKENS = 256

Asked = tuple[Prompt, SamplingParams]  # of one choice


class CountedRequests:
    """Counts the requests of each tenant, and refuses those over its limits before they are read.

    Behind the authentication, and behind what refuses for everybody: such a request is not counted.
    """

    def __init__(self, app: ASGIApp, limiter: Limiter) -> None:
        self._app = app
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in BODY_PATHS:
            await self._app(scope, receive, send)
            return
        visit = Visit(self._limiter, scope.get("impart.tenant", EVERYBODY))
        scope["impart.visit"] = visit

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers_of_rates(visit))
            await send(message)

        try:
            await visit.enter()
        except ServeError as error:
            note_error(scope, error)
            await response_of(error)(scope, receive, send_told)
            return
        try:
            await self._app(scope, receive, send_told)
        finally:
            visit.leave(account_of(scope).used_tokens)


def visit_of(scope: Scope) -> Visit:
    """Return what counts this request's tokens; the request is one of `BODY_PATHS`."""
    return cast(Visit, scope["impart.visit"])


def headers_of_rates(visit: Visit) -> dict[str, str]:
    """Return OpenAI's headers for what is known; what is not is left out."""
    headers = {}
    for unit, rate in visit.rates.items():
        headers[f"x-ratelimit-limit-{unit}"] = str(rate.limit)
        headers[f"x-ratelimit-remaining-{unit}"] = str(rate.remaining)
        headers[f"x-ratelimit-reset-{unit}"] = duration(rate.reset_s)
    return headers


async def granted(
    scope: Scope, reply: Reply, prompts: Sequence[Prompt], asked: Sequence[Asked]
) -> list[Asked]:
    """Return how each choice is to be generated, and reserve the tokens of all of them.

    Raises ContextTooLong, InvalidRequest, RateLimited, QuotaExceeded, LimitsUnreachable.
    """
    visit = visit_of(scope)
    within = within_lengths(visit.limits, reply, asked)
    await visit.reserve(estimate(prompts, reply, [params for _, params in within]))
    return within


def within_lengths(limits: TenantLimits, reply: Reply, asked: Sequence[Asked]) -> list[Asked]:
    """Return how each choice is to be generated, within the tenant's longest prompt and output.

    What the request itself asks for is refused where it is more; what it leaves open is cut.
    Raises ContextTooLong, InvalidRequest.
    """
    longest = max(len(prompt.ids) for prompt, _ in asked)
    if limits.max_prompt_tokens is not None and longest > limits.max_prompt_tokens:
        raise ContextTooLong(
            f"This tenant's prompts may have {limits.max_prompt_tokens} tokens. However, the "
            f"prompt has {longest} tokens. Shorten the prompt.",
            param=reply.field_names.get("prompt", "prompt"),
        )
    most = limits.max_output_tokens
    if most is None:
        return list(asked)
    wanted = reply.body.output_limit
    if wanted is not None and wanted > most:
        name = reply.field_names.get("max_tokens", "max_tokens")
        raise InvalidRequest(
            f"{name} is too large: this tenant's outputs may have {most} tokens, and {wanted} are "
            f"asked for. Lower {name}.",
            param=name,
            code="invalid_value",
        )
    return [
        (prompt, replace(params, max_tokens=min(params.max_tokens, most)))
        for prompt, params in asked
    ]


def estimate(prompts: Sequence[Prompt], reply: Reply, choices: Sequence[SamplingParams]) -> int:
    """Return the tokens to reserve: of each prompt once, and of each choice what it may become."""
    is_bounded = reply.body.output_limit is not None
    outputs = (
        params.max_tokens if is_bounded else min(params.max_tokens, UNBOUNDED_ANSWER_TOKENS)
        for params in choices
    )
    return sum(len(prompt.ids) for prompt in prompts) + sum(outputs)
