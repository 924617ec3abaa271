"""Query string -> validated model."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.errors import invalid_request

P = TypeVar("P", bound=BaseModel)


def parse_query(request: Request, model: type[P]) -> P:
    """Read the query: what is given twice, or as `name[]`, is a list. Raises InvalidRequest."""
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        plain = name.removesuffix("[]")
        given[plain] = f"{given[plain]},{value}" if plain in given else value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise invalid_request(error) from None
