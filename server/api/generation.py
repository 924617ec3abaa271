"""One generation request from validated body to answered client.

The response object does the work itself, because there it has `receive` and `send` at hand:

    admit -> open variant -> tokenise -> fan out -> stream or collect

all of it cancelled when the client leaves (`disconnect`), and bounded by a deadline that counts
from the request's arrival. Errors before the first byte become HTTP errors; after it, a last event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api import sse
from server.api.account import account_of
from server.api.chunks import ChunkWriter
from server.api.context import Api, arrival, log_fields, principal, request_id
from server.api.errors import body_of, internal_error_body
from server.api.fanout import Fanout, Timed
from server.api.names import Opened, open_model
from server.api.open_requests import OpenRequest
from server.api.prompts import Prompt
from server.api.quota import granted
from server.api.reply import Choice, Envelope, Reply, usage_of
from server.engine.types import SamplingParams, Ticket, VariantHandle
from server.errors import DeadlineExceeded, InvalidRequest, ServeError

log = logging.getLogger(__name__)


class GenerationResponse(Response):
    """Answers one completions or chat request."""

    def __init__(self, request: Request, api: Api, reply: Reply) -> None:
        super().__init__()
        self._api = api
        self._reply = reply
        self._request_id = request_id(request)
        self._log = log_fields(request)
        self._account = account_of(request.scope)
        self._arrived = arrival(request)
        self._request = request
        self._principal = principal(request)
        self._deadline = self._arrived + api.settings.request_timeout_s
        self._n = reply.body.n_choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_priority()
        with (
            self._api.admit(self._reply.n_prompts * self._n, self._principal) as ticket,
            self._api.open_requests.enter() as opened,
        ):
            await self._run(ticket, opened, send)

    def _check_priority(self) -> None:
        """Raise InvalidRequest for a priority that would be ignored, as vLLM does."""
        priority = self._reply.body.priority
        if priority and self._api.settings.scheduling_policy != "priority":
            raise InvalidRequest(
                f"The request has priority {priority}, but this server does not schedule by "
                "priority. Leave priority out, or start the server with --scheduling-policy "
                "priority.",
                param="priority",
                code="unsupported_value",
            )

    async def _run(self, ticket: Ticket, opened: OpenRequest, send: Send) -> None:
        engine, reply = self._api.engine, self._reply
        model, prompts = await self._prepare()
        variant = model.variant
        self._account.opened(variant, (len(prompt.ids) for prompt in prompts))
        asked = [
            (prompt, reply.params(prompt, variant, engine.max_model_len, child))
            for prompt in prompts
            for child in range(self._n)
        ]
        asked = await granted(self._request.scope, reply, prompts, asked)
        choices = [Choice(i, prompt) for i, (prompt, _) in enumerate(asked)]
        kind = reply.chunk_object if reply.body.stream else reply.object
        envelope = Envelope.of(reply.id_prefix, kind, model)
        begins = [
            partial(self._begin, variant, ticket, envelope.id, choice, params)
            for choice, (_, params) in zip(choices, asked, strict=True)
        ]
        headers = {"x-impart-delta": variant.digest or "base"}
        try:
            with Fanout(begins) as fanout:
                opened.output = fanout
                self._account.sampling = asked[0][1]
                self._observe_params(variant, asked[0][1])
                if reply.body.stream:
                    await self._stream(fanout, choices, envelope, headers, send)
                else:
                    await self._collect(fanout, choices, envelope, headers, send)
        finally:
            opened.output = None
            self._log["prompt_tokens"] = self._account.prompt_tokens
            self._log["completion_tokens"] = self._account.output_tokens

    async def _prepare(self) -> tuple[Opened, list[Prompt]]:
        """Open the variant and tokenise, within the deadline."""
        engine, reply = self._api.engine, self._reply
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                opened = await open_model(self._request, reply.body.model, reply.body.user)
                variant = opened.variant
                self._log["model"] = variant.name
                return opened, await reply.prompts(engine, variant, self._principal.tenant)
        except TimeoutError:
            raise DeadlineExceeded("the request ran out of its time") from None

    def _begin(
        self,
        variant: VariantHandle,
        ticket: Ticket,
        answer_id: str,
        choice: Choice,
        params: SamplingParams,
        on_output: Callable[[], None],
    ) -> Timed:
        """Begin one choice."""
        ids = choice.prompt.ids
        timer = self._api.metrics.sequence(
            variant.name, self._principal.tenant, len(ids), self._arrived
        )
        try:
            generation = self._api.engine.generate(
                variant,
                ids,
                params,
                request_id=f"{answer_id}-{choice.index}",
                on_output=on_output,
                ticket=ticket,
                deadline=self._deadline,
                cache_salt=self._reply.body.cache_salt or "",
                principal=self._principal,
                priority=self._reply.body.priority or 0,
            )
        except BaseException as error:
            timer.finish("error")
            if isinstance(error, InvalidRequest):
                error.param = self._reply.field_names.get(error.param or "", error.param)
            raise
        timed = Timed(generation, timer)
        self._account.began(choice.index // self._n, timed)
        return timed

    async def _collect(
        self,
        fanout: Fanout,
        choices: list[Choice],
        envelope: Envelope,
        headers: dict[str, str],
        send: Send,
    ) -> None:
        async for batch in fanout.batches():
            for index, chunk in batch:
                choices[index].collect(chunk)
        whole = [self._reply.whole(choice) for choice in choices]
        body = envelope.wrap(whole, usage_of(choices, self._n), with_usage=True)
        await send_json(send, body, headers)

    async def _stream(
        self,
        fanout: Fanout,
        choices: list[Choice],
        envelope: Envelope,
        headers: dict[str, str],
        send: Send,
    ) -> None:
        async with sse.EventStream(send, headers) as out:
            try:
                last = await self._write_events(out, fanout, choices, envelope)
            except Exception as error:
                if not out.started:
                    raise
                last = sse.frame(self._last_words(error))
            await out.end(last)

    async def _write_events(
        self, out: sse.EventStream, fanout: Fanout, choices: list[Choice], envelope: Envelope
    ) -> bytes:
        """Write what comes, one write for all that is there; return what is to be written last."""
        writer = ChunkWriter(self._reply, envelope)
        data = b""
        # Nothing is written before the first event, so that what fails early has a status.
        async for batch in fanout.batches(sse.KEEP_ALIVE_S):
            if not batch:
                await out.write(sse.COMMENT)
                continue
            data = b"".join([writer.render(choices[index], chunk) for index, chunk in batch])
            if data and fanout.is_open:
                await out.write(data)
        if self._reply.body.include_usage:
            usage = usage_of(choices, self._n)
            data += sse.frame(envelope.wrap([], usage, with_usage=True))
        return data + sse.DONE

    def _last_words(self, error: Exception) -> dict[str, Any]:
        self._account.failed = True
        if isinstance(error, ServeError):
            self._log["ended"] = type(error).__name__
            return body_of(error)
        self._log["ended"] = "failed"
        log.error(
            "an unforeseen error ended a stream",
            exc_info=error,
            extra={"request_id": self._request_id},
        )
        return internal_error_body(self._request_id)

    def _observe_params(self, variant: VariantHandle, params: SamplingParams) -> None:
        series = self._api.metrics.model(variant.name)
        series.params_n.observe(self._n)
        series.params_max_tokens.observe(params.max_tokens)


async def send_json(send: Send, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Send a whole 200 answer."""
    data = sse.encode_json(body)
    fields = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    await send({"type": "http.response.body", "body": data})
