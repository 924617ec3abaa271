"""The tenants file, TOML or YAML -> tenants and the hashes of their keys.

[tenants.acme]
variants = ["acme-*"]          # globs; the base is one more name. Default: every variant
weight = 2                     # of what there is when all want more. Default: 1
requests_per_minute = 600      # see `server.tenants.tenant.TenantLimits`
[[tenants.acme.keys]]
id = "production"              # what the ledger and the log call it
sha256 = "..."                 # impart-serve keys create acme
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server.errors import ConfigError
from server.setting_kinds import parse_size
from server.tenants.keys import default_id
from server.tenants.tenant import Tenant, TenantLimits

MAX_FILE_BYTES = 64 << 20
MAX_SAID = 5  # mistakes in one message
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MAX_PRIORITY = 1 << 31

Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Positive = Annotated[int, Field(gt=0, strict=True)]


def _in_utc(when: datetime) -> datetime:
    """A time without a zone is UTC's."""
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when


When = Annotated[datetime, AfterValidator(_in_utc)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key of a tenant; `key_hash` is what there is of it."""

    tenant: Tenant
    key_id: str
    key_hash: str
    expires: datetime | None = None


@dataclass(frozen=True, slots=True)
class TenantsFile:
    """What the file says."""

    tenants: Mapping[str, Tenant]
    keys: tuple[KnownKey, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Key(_Strict):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    id: Name | None = None
    expires: When | None = None


class _Tenant(_Strict):
    keys: tuple[_Key, ...] = ()
    variants: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ("*",)
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    tokens_per_day: Positive | None = None
    tokens_per_month: Positive | None = None
    max_concurrent_requests: Positive | None = None
    max_prompt_tokens: Positive | None = None
    max_output_tokens: Positive | None = None
    resident_bytes: Size | None = None
    pinned: tuple[Name, ...] = ()
    max_priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, strict=True)] = 0
    expires: When | None = None

    def named(self, name: str) -> Tenant:
        """Return it as the server knows it."""
        limits = {field: getattr(self, field) for field in TenantLimits.__slots__}
        return Tenant(
            name=name,
            variants=self.variants,
            limits=TenantLimits(**limits),
            weight=self.weight,
            max_priority=self.max_priority,
            resident_bytes=self.resident_bytes,
            pinned=self.pinned,
            expires=self.expires,
        )


class _File(_Strict):
    tenants: dict[Name, _Tenant]


def read_tenants(path: Path) -> TenantsFile:
    """Read the file. Raises ConfigError, which says where the mistake is."""
    return parse_tenants(_text(path), path)


def parse_tenants(text: str, path: Path) -> TenantsFile:
    """What `text` says; the suffix of `path` tells how it is written. Raises ConfigError."""
    try:
        parsed = _File.model_validate(_parsed(text, path))
    except ValidationError as error:
        raise _refusal(path, _sentences(error)) from None
    tenants = {name: said.named(name) for name, said in parsed.tenants.items()}
    keys = tuple(
        KnownKey(tenants[name], key.id or default_id(key.sha256), key.sha256, key.expires)
        for name, said in parsed.tenants.items()
        for key in said.keys
    )
    _refuse_doubles(path, keys)
    for tenant in tenants.values():
        for variant in tenant.pinned:
            if not tenant.may_use(variant):
                said = f"tenants.{tenant.name}.pinned: the tenant may not use `{variant}`"
                raise _refusal(path, f"{said}; add it to variants")
    return TenantsFile(tenants, keys)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _refusal(path, f"it cannot be read ({error.strerror})") from error
    if len(data) > MAX_FILE_BYTES:
        raise _refusal(path, f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refusal(path, f"it is not UTF-8 (byte {error.start})") from None


def _parsed(text: str, path: Path) -> Any:
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise _refusal(path, f"it is no TOML: {error}") from None
    if path.suffix in (".yaml", ".yml"):
        try:
            return _yaml(text)
        except (yaml.YAMLError, RecursionError) as error:
            where = getattr(error, "problem_mark", None)
            line = f" (line {where.line + 1})" if where else ""
            problem = getattr(error, "problem", None) or type(error).__name__
            raise _refusal(path, f"it is no YAML: {problem}{line}") from None
    raise _refusal(path, "its name must end in .toml, .yaml or .yml")


def _yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # the library has no types
    """YAML as safe_load reads it, but a key that stands twice is refused: the earlier one would be
    dropped without a word. So are references: they can make a short file endless.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="references are not read", problem_mark=mark)
        return super().compose_node(parent, index)


def _refuse_doubles(path: Path, keys: tuple[KnownKey, ...]) -> None:
    owners: dict[str, KnownKey] = {}
    ids: set[tuple[str, str]] = set()
    for key in keys:
        other = owners.setdefault(key.key_hash, key)
        if other is not key:
            raise _refusal(
                path,
                f"key {key.key_id} of tenant {key.tenant.name} is also key {other.key_id} of "
                f"tenant {other.tenant.name}; a key has one owner",
            )
        if (key.tenant.name, key.key_id) in ids:
            raise _refusal(path, f"tenant {key.tenant.name} has two keys of the id {key.key_id}")
        ids.add((key.tenant.name, key.key_id))


def _sentences(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)
    said = [f"{_place(item['loc'])}: {item['msg']}" for item in found[:MAX_SAID]]
    if len(found) > MAX_SAID:
        said.append(f"and {len(found) - MAX_SAID} more")
    return "; ".join(said)


def _place(parts: tuple[int | str, ...]) -> str:
    text = ""
    for part in parts:
        if part == "[key]":  # pydantic's, behind a name that is none
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part[:80]}" if text else part[:80]
    return re.sub(r"[^\x20-\x7e]", "?", text) or "the file"


def _refusal(path: Path, why: str) -> ConfigError:
    return ConfigError(f"the tenants file {path}: {why}")
