"""``/tokenize`` and ``/detokenize`` in vLLM's shape, with the variant's own tokenizer."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from server.api.body import parse_body
from server.api.context import api_of, principal
from server.api.errors import invalid_request
from server.api.names import open_model
from server.api.prompts import check_length, render_messages
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.errors import InvalidRequest

MAX_TOKEN_STRINGS = 4096  # each is a call of the tokenizer

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> JSONResponse:
    """Return the token ids of a text or a conversation."""
    api = api_of(request)
    body = await parse_body(request, TokenizeRequest)
    variant = (await open_model(request, body.model)).variant
    try:
        chat = body.chat
    except ValidationError as error:
        raise invalid_request(error) from None
    name = principal(request).tenant
    if chat is None:
        text = body.prompt or ""
        check_length(len(text), api.engine, variant, "prompt")
        special = body.add_special_tokens is not False
        ids = await api.engine.encode(variant, text, add_special_tokens=special, tenant=name)
    else:
        ids = list((await render_messages(api.engine, variant, chat, tenant=name)).ids)
    strings = None
    if body.return_token_strs:
        if len(ids) > MAX_TOKEN_STRINGS:
            raise InvalidRequest(
                f"return_token_strs is limited to {MAX_TOKEN_STRINGS} tokens.",
                param="return_token_strs",
            )
        strings = await api.engine.token_texts(variant, ids)
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": api.engine.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
    )


@router.post("/detokenize")
async def detokenize(request: Request) -> JSONResponse:
    """Return the text of token ids."""
    api = api_of(request)
    body = await parse_body(request, DetokenizeRequest)
    variant = (await open_model(request, body.model)).variant
    most = 2 * api.engine.max_model_len
    if len(body.tokens) > most:
        raise InvalidRequest(
            f"At most {most} tokens can be made text at once, twice this model's context. "
            "Send less at once.",
            param="tokens",
        )
    if body.tokens and max(body.tokens) >= variant.vocab_size:
        raise InvalidRequest(
            f"This model's token ids are below {variant.vocab_size}.", param="tokens"
        )
    return JSONResponse({"prompt": await api.engine.decode(variant, body.tokens)})
