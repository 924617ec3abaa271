"""Which names a tenant may use, and what the engine hears of it."""

from __future__ import annotations

import pytest

from server.tenants.principal import Principal
from server.tenants.tenant import Tenant


@pytest.mark.parametrize(
    ("patterns", "name", "may"),
    [
        (("*",), "anything", True),
        ((), "anything", False),
        (("acme-*",), "acme-support", True),
        (("acme-*",), "Acme-support", False),
        (("acme-*", "base"), "base", True),
        (("acme-?",), "acme-12", False),
    ],
)
def test_tenant_uses_what_a_pattern_matches(patterns, name, may):
    assert Tenant("acme", variants=patterns).may_use(name) is may


def test_tenant_principal_carries_what_the_engine_needs():
    tenant = Tenant("acme", weight=3.0, max_priority=-2, resident_bytes=10)
    assert tenant.principal("k1") == Principal("acme", "k1", 3.0, -2, 10)
