"""Who a key belongs to: the tenants that are known now, read again while the server runs.

Requests carry a snapshot of their tenant, so that a change of the file takes effect from the next
request on and never in the middle of one.
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import SecretStr

from server.errors import ConfigError, Unauthenticated
from server.settings import Settings, keeps_quotas
from server.tenants.file import KnownKey, TenantsFile, read_tenants
from server.tenants.keys import fault_of, hash_of
from server.tenants.principal import NOBODY, Principal
from server.tenants.tenant import EVERYBODY, Tenant

SETTINGS_KEY_ID = "settings"  # of the key that --api-key gave
PROXY_KEY_ID = "proxy"
MAX_REMEMBERED = 4096  # keys that were right, so that each need not be compared with all again

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request is from."""

    tenant: Tenant
    key_id: str = ""

    @property
    def principal(self) -> Principal:
        """What goes to the engine."""
        return self.tenant.principal(self.key_id)


@dataclass(frozen=True, slots=True)
class _Known:
    """One reading of the file.

    remembered  by hash; a dictionary's look-up may take a time that depends on the hash it is asked
                for, which tells nothing of a key
    """

    tenants: Mapping[str, Tenant]
    keys: tuple[KnownKey, ...]
    remembered: dict[str, KnownKey] = field(default_factory=dict)

    def find(self, key: str) -> KnownKey | None:
        key_hash = hash_of(key)
        known = self.remembered.get(key_hash)
        if known is not None:
            return known
        for candidate in self.keys:  # all, so that the time does not tell which one was near
            if hmac.compare_digest(candidate.key_hash, key_hash):
                known = candidate
        if known is not None and len(self.remembered) < MAX_REMEMBERED:
            self.remembered[key_hash] = known
        return known


class Directory:
    """Tenants and keys. `caller` may be asked from any thread, `reload` runs once at a time.

    path          the tenants file, if there is one
    api_key       the key of the one tenant of a server without such a file
    proxy_key     whoever sends it names the tenant in a header
    keeps_quotas  whether what was used in a day or month outlives the server; else no tenant may
                  have a quota
    """

    def __init__(
        self,
        path: Path | None = None,
        api_key: str | None = None,
        proxy_key: str | None = None,
        *,
        keeps_quotas: bool = True,
    ) -> None:
        self._path = path
        self._keeps_quotas = keeps_quotas
        self._api_key = api_key
        self._proxy_hash = None if proxy_key is None else hash_of(proxy_key)
        self._lock = threading.Lock()
        self._known = self._read()

    @property
    def has_keys(self) -> bool:
        """Whether a request needs one."""
        return self._path is not None or self._api_key is not None or self._proxy_hash is not None

    @property
    def tenants(self) -> Iterable[Tenant]:
        """All that are known now."""
        return self._known.tenants.values()

    @property
    def pinned(self) -> dict[Principal, tuple[str, ...]]:
        """The variants that tenants pin."""
        return {tenant.principal(""): tenant.pinned for tenant in self.tenants if tenant.pinned}

    def key_ids(self) -> dict[str, list[str]]:
        """Return the ids of each tenant's keys."""
        ids: dict[str, list[str]] = {}
        for key in self._known.keys:
            ids.setdefault(key.tenant.name, []).append(key.key_id)
        return ids

    def caller(self, key: str | None, named: str | None = None) -> Caller:
        """Return whom a request with this key is from; raises Unauthenticated.

        named  what the proxy's header says; nobody else's is looked at
        """
        if not self.has_keys:
            return Caller(EVERYBODY)
        known = self._known
        if key is None:
            raise Unauthenticated(
                "You didn't provide an API key. Send it in an Authorization header: "
                "Authorization: Bearer KEY."
            )
        if self._is_proxy(key):
            return self._named_by_proxy(known, named)
        found = known.find(key)
        if found is None:
            raise Unauthenticated("Incorrect API key provided.")
        now = datetime.now(UTC)
        for expires in (found.expires, found.tenant.expires):
            if expires is not None and now >= expires:
                raise Unauthenticated("Incorrect API key provided: this one has expired.")
        return Caller(found.tenant, found.key_id)

    def reload(self) -> None:
        """Read the file again. Raises ConfigError; what was known before is then kept."""
        with self._lock:
            self._known = self._read()
        log.info("the server knows %d tenants and %d keys", *self._counts())

    def _counts(self) -> tuple[int, int]:
        known = self._known
        return len(known.tenants), len(known.keys)

    def _is_proxy(self, key: str) -> bool:
        return self._proxy_hash is not None and hmac.compare_digest(self._proxy_hash, hash_of(key))

    def _named_by_proxy(self, known: _Known, named: str | None) -> Caller:
        tenant = None if named is None else known.tenants.get(named)
        if tenant is None:
            raise Unauthenticated("The proxy named no tenant that is known here.")
        if tenant.expires is not None and datetime.now(UTC) >= tenant.expires:
            raise Unauthenticated("The tenant's time here has expired.")
        return Caller(tenant, PROXY_KEY_ID)

    def _read(self) -> _Known:
        said = TenantsFile({}, ()) if self._path is None else read_tenants(self._path)
        keys = said.keys
        tenants = dict(said.tenants)
        if not self._keeps_quotas:
            _check_no_quota(tenants.values())
        if self._api_key is not None:
            everybody = tenants.setdefault(NOBODY, EVERYBODY)
            keys = (*keys, KnownKey(everybody, SETTINGS_KEY_ID, hash_of(self._api_key)))
        if self._path is not None and self._proxy_hash is None:
            for name in tenants.keys() - {key.tenant.name for key in keys}:
                log.warning("tenant %s has no key: nobody can call as it", name)
        return _Known(tenants, keys)


def directory_of(settings: Settings) -> Directory:
    """Return the tenants that the settings name. Raises ConfigError."""
    if settings.tenants is not None and settings.api_key is not None:
        raise ConfigError(
            "api_key is for a server of one tenant, tenants names a file of several: give one of "
            "them (impart-serve keys create TENANT makes a key for the file)"
        )
    if (settings.tenant_header is None) != (settings.trusted_proxy_key is None):
        raise ConfigError(
            "tenant_header and trusted_proxy_key belong together: the header is believed only of "
            "the proxy that sends this key"
        )
    if settings.trusted_proxy_key is not None and settings.tenants is None:
        raise ConfigError("trusted_proxy_key needs tenants, the file of those the proxy may name")
    return Directory(
        settings.tenants,
        key_of("api_key", settings.api_key),
        key_of("trusted_proxy_key", settings.trusted_proxy_key),
        keeps_quotas=keeps_quotas(settings),
    )


def _check_no_quota(tenants: Iterable[Tenant]) -> None:
    for tenant in tenants:
        limits = tenant.limits
        if limits.tokens_per_day is not None or limits.tokens_per_month is not None:
            raise ConfigError(
                f"tenant {tenant.name} has a quota a day or month, and nothing would know after "
                "a restart what was used of it: give state_dir or ledger_url, or with several "
                "servers limits_storage redis://HOST:PORT"
            )


def key_of(name: str, secret: SecretStr | None) -> str | None:
    """Return the key that a setting holds. Raises ConfigError where it cannot be one."""
    if secret is None:
        return None
    key = secret.get_secret_value()
    fault = fault_of(key)
    if fault is not None:
        raise ConfigError(f"{name} {fault}")
    return key
