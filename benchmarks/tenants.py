"""A tenants file for a server under measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping

from server.tenants.keys import hash_of


def tenants_text(keys: Mapping[str, str], settings: Mapping[str, Mapping[str, object]]) -> str:
    """Return TOML of tenants with a key each.

    settings  what each tenant has beside: numbers, texts, lists of texts
    """
    lines = []
    for tenant, key in keys.items():
        lines.append(f"[tenants.{tenant}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in settings[tenant].items()]
        lines += [f"[[tenants.{tenant}.keys]]", f'sha256 = "{hash_of(key)}"']
    return "\n".join(lines) + "\n"
