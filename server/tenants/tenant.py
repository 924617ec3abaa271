"""One tenant as the operator describes it: rights, limits, share."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase

from server.tenants.principal import MOST_URGENT, NOBODY, Principal


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may use; None is no limit. Tokens are those of prompts and outputs together,
    and days and months are UTC's.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    max_concurrent_requests: int | None = None
    max_prompt_tokens: int | None = None  # of one request's prompt
    max_output_tokens: int | None = None  # of one choice


@dataclass(frozen=True, slots=True)
class Tenant:
    """See `server.tenants.principal.Principal` for weight, max_priority and resident_bytes.

    variants  globs of the names it may use, the base's among them
    pinned    variants that stay in device memory for it
    expires   from when on its keys are refused; None: never
    """

    name: str = NOBODY
    variants: tuple[str, ...] = ("*",)
    limits: TenantLimits = TenantLimits()
    weight: float = 1.0
    max_priority: int = 0
    resident_bytes: int | None = None
    pinned: tuple[str, ...] = ()
    expires: datetime | None = None

    def may_use(self, name: str) -> bool:
        """Whether it may use the model of this name, as the server lists it."""
        return any(fnmatchcase(name, pattern) for pattern in self.variants)

    def principal(self, key_id: str) -> Principal:
        """What the engine knows of a request that came with this key."""
        return Principal(self.name, key_id, self.weight, self.max_priority, self.resident_bytes)


EVERYBODY = Tenant(max_priority=MOST_URGENT)  # the one tenant of a server without keys
