"""What a tenant sees of the models: its own, and of others not even that they exist."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import Request

from server.api.context import api_of, tenant
from server.engine.types import ModelInfo
from server.errors import Forbidden, ModelNotFound


def visible_models(request: Request) -> Iterator[ModelInfo]:
    """Yield the models that this request's tenant may use."""
    may_use = tenant(request).may_use
    return (info for info in api_of(request).engine.models() if may_use(info.name))


def no_such_model(model: str) -> ModelNotFound:
    """Return the one refusal of a name that nobody may use, or not this tenant."""
    return ModelNotFound(f"The model `{model[:200]}` does not exist.", param="model")


def is_admin(request: Request) -> bool:
    """Whether this request may change the server and see more than one tenant."""
    return bool(request.scope.get("impart.admin", False))


def require_admin(request: Request) -> None:
    """Refuse whoever may not change the server or see more than one tenant. Raises Forbidden."""
    if not is_admin(request):
        raise Forbidden("Only the admin listener does this, with the admin key: see --admin-key.")
