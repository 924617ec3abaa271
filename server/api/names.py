"""What a request's `model` means: a name, one of its versions, or an alias.

NAME, BASE:NAME      the base or a variant
NAME@DIGESTPREFIX    a variant while its bytes are these (8 digits or more)
ALIAS                what an operator has pointed it to (`server.fleet.aliases`)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastapi import Request

from server.api.access import no_such_model
from server.api.context import api_of, principal, tenant
from server.engine.types import EngineClient, ModelInfo, VariantHandle
from server.errors import DeltaBroken, DeltaUnusable, ModelNotFound
from server.fleet.aliases import Alias, versioned

NO_NAME = "/"  # no model can have it


@dataclass(frozen=True, slots=True)
class Opened:
    """A model for one request.

    shown  its name in the answer: an alias is not told apart, the digest in the headers tells
    """

    variant: VariantHandle
    shown: str


async def open_model(request: Request, model: str, user: str | None = None) -> Opened:
    """Open a model for this request.

    Another tenant's is looked for under a name that does not exist, so that the answer and the time
    it takes are those of any unknown name. `user` is whom the request is for: the same one gets the
    same of an alias's targets, as does the same key without one. Raises as `EngineClient.open`.
    """
    api = api_of(request)
    alias = api.aliases.get(model)
    if alias is not None and tenant(request).may_use(alias.name):
        return Opened(await _open_target(request, alias, user), alias.name)
    name, _ = versioned(model) or (model, "")
    may_use = tenant(request).may_use(name.removeprefix(f"{api.engine.base_name}:"))
    try:
        variant = await _open_version(request, model if may_use else NO_NAME)
    except ModelNotFound:
        raise no_such_model(model) from None
    return Opened(variant, variant.name)


def find_model(engine: EngineClient, model: str) -> ModelInfo | None:
    """What is listed of a name or a version of one, which an alias may stand for."""
    name, prefix = versioned(model) or (model, "")
    info = engine.model(name)
    return info if info is not None and (info.digest or "").startswith(prefix) else None


def alias_info(engine: EngineClient, alias: Alias) -> ModelInfo:
    """An alias as a model: what the first of its targets is, which has no digest of its own."""
    first = find_model(engine, alias.targets[0].model)
    if first is None:
        gone = "what it stands for is not here any more"
        return ModelInfo(alias.name, engine.base_name, None, "failed", 0, 0, error=gone)
    digest = first.digest if len(alias.targets) == 1 else None
    return replace(first, name=alias.name, parent=engine.base_name, digest=digest)


async def _open_target(request: Request, alias: Alias, user: str | None) -> VariantHandle:
    caller = principal(request)
    sticky = f"{caller.tenant}\n{user or caller.key_id}" if user or caller.key_id else ""
    try:
        return await _open_version(request, alias.choose(sticky))
    except ModelNotFound:
        raise _gone(alias) from None
    except (DeltaBroken, DeltaUnusable) as error:  # whose message names the target
        raise type(error)(
            f"What `{alias.name}` stands for cannot be served. An operator must mend it, or point "
            "the alias elsewhere.",
            param="model",
            retry_after_s=error.retry_after_s,
        ) from error


async def _open_version(request: Request, model: str) -> VariantHandle:
    """Open a name, or a version of one. Raises as `EngineClient.open`."""
    name, prefix = versioned(model) or (model, "")
    variant = await api_of(request).engine.open(name, principal(request))
    if not (variant.digest or "").startswith(prefix):
        raise no_such_model(model)
    return variant


def _gone(alias: Alias) -> DeltaBroken:
    return DeltaBroken(
        f"What `{alias.name}` stands for is not here any more. An operator must point the alias "
        "elsewhere.",
        param="model",
    )
