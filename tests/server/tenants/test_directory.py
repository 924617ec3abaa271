"""Who a key belongs to, before and after the file changed, and what never lets in."""

from __future__ import annotations

import hmac
import logging
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import SecretStr

from server.errors import ConfigError, Unauthenticated
from server.settings import Settings
from server.tenants.directory import Directory, directory_of
from server.tenants.keys import hash_of
from server.tenants.tenant import EVERYBODY

ACME, GLOBEX, PROXY = "acme-key-0123456789", "globex-key-01234567", "proxy-key-012345678"
FILE = f"""
[tenants.acme]
weight = 3
[[tenants.acme.keys]]
id = "one"
sha256 = "{hash_of(ACME)}"
[tenants.globex]
[[tenants.globex.keys]]
id = "two"
sha256 = "{hash_of(GLOBEX)}"
[tenants.keyless]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    return path


def test_caller_is_the_owner_of_the_key(path):
    directory = Directory(path)
    for _ in range(2):  # the second time from memory
        assert directory.caller(ACME).principal.tenant == "acme"
        assert directory.caller(ACME).principal.weight == 3.0
        assert directory.caller(GLOBEX).key_id == "two"


@pytest.mark.parametrize(
    "key",
    [
        None,
        "",
        ACME[:-1],
        ACME + "x",
        ACME.upper(),
        ACME + " ",
        hash_of(ACME),
        "ключ" * 5,
        "\udc80",
    ],
)
def test_key_that_is_not_known_is_refused_without_its_text(path, key):
    with pytest.raises(Unauthenticated) as refused:
        Directory(path).caller(key)
    assert not key or key not in refused.value.message


def test_each_known_key_is_compared_whichever_is_right(path, monkeypatch):
    directory = Directory(path)
    compared: list[object] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    counts = []
    for key in (ACME, GLOBEX, "wrong-key-0123456789"):
        compared.clear()
        with suppress(Unauthenticated):
            directory.caller(key)
        counts.append(len(compared))
    assert counts == [2, 2, 2]


def test_server_without_keys_takes_anybody():
    directory = Directory()
    assert not directory.has_keys
    assert directory.caller(None).tenant is EVERYBODY
    assert directory.caller("whatever").tenant is EVERYBODY


def test_key_of_the_settings_is_the_one_tenants():
    directory = Directory(api_key=ACME)
    assert directory.caller(ACME).tenant is EVERYBODY
    with pytest.raises(Unauthenticated):
        directory.caller(GLOBEX)


@pytest.mark.parametrize("where", ["key", "tenant"])
def test_expired_key_is_refused_from_its_time_on(tmp_path, where):
    path = tmp_path / "t.toml"
    said = {"key": "", "tenant": ""} | {where: "expires = 2020-01-01T00:00:00Z"}
    path.write_text(
        f"[tenants.a]\n{said['tenant']}\n[[tenants.a.keys]]\n"
        f'sha256 = "{hash_of(ACME)}"\n{said["key"]}\n'
    )
    with pytest.raises(Unauthenticated, match="has expired"):
        Directory(path).caller(ACME)
    path.write_text(path.read_text().replace("2020", "2999"))
    assert Directory(path).caller(ACME).tenant.name == "a"


def test_reload_takes_effect_and_a_mistake_keeps_the_old_ones(path, caplog):
    directory = Directory(path)
    directory.caller(ACME)
    path.write_text("[tenants.acme")
    with pytest.raises(ConfigError, match="no TOML"):
        directory.reload()
    assert directory.caller(ACME).tenant.name == "acme"
    path.write_text(FILE.replace(hash_of(ACME), hash_of("new-key-0123456789ab")))
    directory.reload()
    with pytest.raises(Unauthenticated):  # also what was remembered
        directory.caller(ACME)
    assert directory.caller("new-key-0123456789ab").tenant.name == "acme"


def test_tenant_without_a_key_is_warned_of(path, caplog):
    with caplog.at_level(logging.WARNING):
        Directory(path)
    assert "tenant keyless has no key" in caplog.text


def test_proxy_names_the_tenant_and_nobody_else_does(path):
    directory = Directory(path, proxy_key=PROXY)
    assert directory.caller(PROXY, "keyless").tenant.name == "keyless"
    assert directory.caller(ACME, "globex").tenant.name == "acme"
    for named in (None, "", "nobody", "Acme"):
        with pytest.raises(Unauthenticated, match="named no tenant"):
            directory.caller(PROXY, named)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"api_key": SecretStr(ACME), "tenants": "FILE"}, "give one of them"),
        ({"api_key": SecretStr("")}, "api_key must be printable ASCII"),
        ({"api_key": SecretStr("short-secret")}, "api_key must have 16 to 512 characters, has 12"),
        ({"tenant_header": "x-tenant"}, "belong together"),
        ({"trusted_proxy_key": SecretStr(PROXY)}, "belong together"),
        ({"trusted_proxy_key": SecretStr(PROXY), "tenant_header": "x-tenant"}, "needs tenants"),
        ({"tenants": Path("missing.toml")}, "missing.toml: it cannot be read"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(path, changes, says):
    given = {name: path if value == "FILE" else value for name, value in changes.items()}
    with pytest.raises(ConfigError) as refused:
        directory_of(Settings(base=Path("b"), **given))
    assert says in refused.value.message
    assert ACME not in refused.value.message
    assert "short-secret" not in refused.value.message


def test_secrets_do_not_show_in_the_settings():
    settings = Settings(base=Path("b"), api_key=SecretStr(ACME), admin_key=SecretStr(PROXY))
    assert ACME not in repr(settings)
    assert PROXY not in str(settings)


@pytest.mark.parametrize("limit", ["tokens_per_day", "tokens_per_month"])
def test_quota_that_nothing_would_remember_is_refused_at_the_start_and_on_reload(
    limit: str, tmp_path: Path
) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    settings = Settings(base=tmp_path, tenants=path)
    directory = directory_of(settings)
    path.write_text(FILE.replace("weight = 3", f"{limit} = 5"))
    for read in (directory.reload, lambda: directory_of(settings)):
        with pytest.raises(ConfigError, match="tenant acme has a quota a day or month"):
            read()
    for kept in (
        {"state_dir": tmp_path},
        {"ledger_url": SecretStr("sqlite://")},
        {"limits_storage": SecretStr("redis://127.0.0.1:1")},
    ):
        limits = directory_of(Settings(base=tmp_path, tenants=path, **kept)).caller(ACME).tenant
        assert getattr(limits.limits, limit) == 5
