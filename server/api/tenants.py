"""``/v1/tenants``: who the tenants are, and reading their file again."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api.access import require_admin
from server.api.context import api_of, request_id
from server.api.origin import refuse_other_sites
from server.api.reload import reload_tenants
from server.errors import ConfigError, InvalidRequest
from server.tenants.directory import Directory
from server.tenants.tenant import Tenant

router = APIRouter(dependencies=[Depends(require_admin)])


@router.get("/v1/tenants")
async def list_tenants(request: Request) -> JSONResponse:
    """List the tenants, their rights and limits; of their keys the ids only."""
    return _listing(api_of(request).directory)


@router.post("/v1/tenants/reload", dependencies=[Depends(refuse_other_sites)])
async def reload_file(request: Request) -> JSONResponse:
    """Read the tenants file again; with a mistake in it the old tenants stay."""
    api = api_of(request)
    try:
        await reload_tenants(api, "admin", request_id(request))
    except ConfigError as error:
        raise InvalidRequest(error.message) from None
    return _listing(api.directory)


def _listing(directory: Directory) -> JSONResponse:
    key_ids = directory.key_ids()
    data = [_tenant(tenant, key_ids.get(tenant.name, [])) for tenant in directory.tenants]
    return JSONResponse({"object": "list", "data": data})


def _tenant(tenant: Tenant, key_ids: list[str]) -> dict[str, Any]:
    limits = tenant.limits
    return {
        "id": tenant.name,
        "object": "tenant",
        "keys": key_ids,
        "variants": list(tenant.variants),
        "weight": tenant.weight,
        "max_priority": tenant.max_priority,
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "tokens_per_day": limits.tokens_per_day,
        "tokens_per_month": limits.tokens_per_month,
        "max_concurrent_requests": limits.max_concurrent_requests,
        "max_prompt_tokens": limits.max_prompt_tokens,
        "max_output_tokens": limits.max_output_tokens,
        "resident_bytes": tenant.resident_bytes,
        "pinned": list(tenant.pinned),
        "expires_at": None if tenant.expires is None else int(tenant.expires.timestamp()),
    }
