"""The tenants file: what it says, and that each mistake is refused with its place."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.tenants.file import parse_tenants, read_tenants
from server.tenants.keys import hash_of
from server.tenants.tenant import Tenant, TenantLimits

ONE, TWO = hash_of("one"), hash_of("two")
WHOLE_TOML = f"""
[tenants.acme]
variants = ["acme-*", "base"]
weight = 2
requests_per_minute = 60
tokens_per_minute = 1000
tokens_per_day = 10000
tokens_per_month = 100000
max_concurrent_requests = 4
max_prompt_tokens = 512
max_output_tokens = 64
resident_bytes = "2GiB"
pinned = ["acme-support"]
max_priority = -1
expires = 2030-01-01T00:00:00Z
[[tenants.acme.keys]]
id = "production"
sha256 = "{ONE}"
[[tenants.acme.keys]]
sha256 = "{TWO}"
expires = 2029-01-01
[tenants."globex.eu"]
"""
WHOLE_YAML = f"""
tenants:
  acme:
    variants: ["acme-*", "base"]
    weight: 2
    requests_per_minute: 60
    tokens_per_minute: 1000
    tokens_per_day: 10000
    tokens_per_month: 100000
    max_concurrent_requests: 4
    max_prompt_tokens: 512
    max_output_tokens: 64
    resident_bytes: 2GiB
    pinned: [acme-support]
    max_priority: -1
    expires: 2030-01-01T00:00:00Z
    keys:
      - id: production
        sha256: "{ONE}"
      - sha256: "{TWO}"
        expires: 2029-01-01
  globex.eu: {{}}
"""
ACME = Tenant(
    name="acme",
    variants=("acme-*", "base"),
    limits=TenantLimits(60, 1000, 10000, 100000, 4, 512, 64),
    weight=2.0,
    max_priority=-1,
    resident_bytes=2 << 30,
    pinned=("acme-support",),
    expires=datetime(2030, 1, 1, tzinfo=UTC),
)


@pytest.mark.parametrize(("name", "text"), [("t.toml", WHOLE_TOML), ("t.yaml", WHOLE_YAML)])
def test_file_in_either_language_says_the_same(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    said = read_tenants(path)
    assert said.tenants == {"acme": ACME, "globex.eu": Tenant("globex.eu")}
    first, second = said.keys
    assert (first.tenant, first.key_id, first.key_hash) == (ACME, "production", ONE)
    assert (second.key_id, second.expires) == (TWO[:8], datetime(2029, 1, 1, tzinfo=UTC))


def keys(*hashes: str, tenant: str = "a") -> str:
    return "".join(f'[[tenants.{tenant}.keys]]\nsha256 = "{text}"\n' for text in hashes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tenants = 3", "tenants: Input should be a valid dictionary"),
        ("", "tenants: Field required"),
        ("x = 1\n[tenants]", "x: Extra inputs are not permitted"),
        ("[tenants.a]\nrequest_per_minute = 5", "tenants.a.request_per_minute: Extra inputs"),
        ("[tenants.a]\nrequests_per_minute = 0", "tenants.a.requests_per_minute: Input should be"),
        ("[tenants.a]\nrequests_per_minute = 1.5", "requests_per_minute: Input should be a valid"),
        ("[tenants.a]\nrequests_per_minute = true", "requests_per_minute: Input should be a valid"),
        ("[tenants.a]\nweight = 0", "tenants.a.weight"),
        ("[tenants.a]\nweight = inf", "tenants.a.weight"),
        ("[tenants.a]\nweight = nan", "tenants.a.weight"),
        ('[tenants.a]\nresident_bytes = "2 parsecs"', "'2 parsecs' is not a size"),
        ('[tenants."a b"]', "tenants.a b: String should match"),
        ('[tenants."a\\nb"]', "tenants.a?b: String should match"),
        ('[tenants.""]', "tenants"),
        ("[tenants.a]\nvariants = [3]", "tenants.a.variants[0]: Input should be a valid string"),
        ('[tenants.a]\nvariants = ["x"]\npinned = ["y"]', "may not use `y`; add it to variants"),
        (keys("ABC"), "tenants.a.keys[0].sha256: String should match"),
        (keys(ONE.upper()), "tenants.a.keys[0].sha256"),
        (keys(ONE, ONE), f"key {ONE[:8]} of tenant a is also key {ONE[:8]} of tenant a"),
        (keys(ONE) + keys(ONE, tenant="b"), "of tenant b is also key"),
        ("[tenants.a]\n[tenants.a]", "it is no TOML: Cannot declare"),
        ("[tenants.a", "it is no TOML: "),
    ],
)
def test_toml_with_a_mistake_is_refused_with_its_place(text, says):
    with pytest.raises(ConfigError) as refused:
        parse_tenants(text, Path("t.toml"))
    assert says in refused.value.message
    assert refused.value.message.startswith("the tenants file t.toml: ")
    assert "\n" not in refused.value.message.partition("TOML")[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tenants: {a: {}, a: {}}", "a stands twice (line 1)"),
        ("tenants:\n  a: &x {}\n  b: *x\n", "references are not read (line 3)"),
        ("tenants: [", "it is no YAML"),
        ("tenants: !!python/object/apply:os.system ['true']", "it is no YAML: could not determine"),
        ("", "the file: Input should be"),
        ("[" * 5000, "it is no YAML"),
    ],
)
def test_yaml_with_a_mistake_or_a_trap_is_refused(text, says):
    with pytest.raises(ConfigError) as refused:
        parse_tenants(text, Path("t.yaml"))
    assert says in refused.value.message


def test_many_mistakes_are_counted_not_listed():
    text = "[tenants.a]\n" + "".join(f"x{i} = 1\n" for i in range(100))
    with pytest.raises(ConfigError, match="and 95 more"):
        parse_tenants(text, Path("t.toml"))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.json", b"{}", "must end in .toml, .yaml or .yml"),
        ("t.toml", b"\xff", "it is not UTF-8 (byte 0)"),
        ("missing.toml", None, "it cannot be read (No such file or directory)"),
    ],
)
def test_file_that_cannot_be_read_is_named(tmp_path, name, data, says):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        read_tenants(path)
    assert says in refused.value.message
    assert str(path) in refused.value.message


def test_two_ids_alike_in_one_tenant_are_refused():
    text = "".join(f'[[tenants.a.keys]]\nid = "same"\nsha256 = "{text}"\n' for text in (ONE, TWO))
    with pytest.raises(ConfigError, match="tenant a has two keys of the id same"):
        parse_tenants(text, Path("t.toml"))
