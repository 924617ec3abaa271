"""Addresses: none is open to other machines without a key, the admin routes have their own."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import SecretStr

from server.errors import ConfigError
from server.process.listeners import listeners
from server.settings import Settings

KEY = SecretStr("admin-key-0123456789")


def settings(**changes: object) -> Settings:
    return Settings(**{"base": Path("b"), "port": 0, **changes})


def port_before_a_free_one() -> int:
    """Other tests take ports meanwhile: look until two that follow each other are free."""
    for _ in range(50):
        with listeners(settings(), has_keys=False) as free:
            port: int = free.main[0].getsockname()[1]
            with suppress(ConfigError), listeners(settings(port=port + 1), has_keys=False):
                return port
    raise AssertionError("no two ports that follow each other are free")


def test_other_host_without_key_is_refused_unless_asked_for(caplog):
    with (
        pytest.raises(ConfigError, match="can be reached from other machines"),
        listeners(settings(host="0.0.0.0"), has_keys=False),
    ):
        pass
    with listeners(settings(host="0.0.0.0", insecure_no_auth=True), has_keys=False) as bound:
        assert bound.main
    assert "without any key" in caplog.text
    with listeners(settings(host="0.0.0.0"), has_keys=True) as bound:
        assert bound.main
    with listeners(settings(host="localhost"), has_keys=False) as bound:
        assert bound.main


def test_keys_and_no_auth_contradict_each_other():
    with (
        pytest.raises(ConfigError, match="drop one"),
        listeners(settings(insecure_no_auth=True), has_keys=True),
    ):
        pass


def test_admin_routes_have_a_socket_only_with_their_key(caplog):
    with caplog.at_level(logging.INFO), listeners(settings(), has_keys=True) as bound:
        assert bound.admin == []
    assert "there is no admin key" in caplog.text
    with listeners(settings(admin_key=KEY), has_keys=False) as bound:
        host, port = bound.admin[0].getsockname()
        assert (host, bound.admin_key) == ("127.0.0.1", KEY.get_secret_value())
        assert port != bound.main[0].getsockname()[1]
    assert bound.admin[0].fileno() == bound.main[0].fileno() == -1  # given back


def test_admin_port_is_the_one_after_or_the_one_asked_for():
    port = port_before_a_free_one()
    with listeners(settings(port=port, admin_key=KEY), has_keys=False) as bound:
        assert bound.admin[0].getsockname()[1] == port + 1
    with (
        pytest.raises(ConfigError, match="set admin_port"),
        listeners(settings(port=65535, admin_key=KEY), has_keys=False),
    ):
        pass


def test_admin_address_in_use_gives_the_other_back():
    with listeners(settings(), has_keys=False) as other:
        taken = other.main[0].getsockname()[1]
        with (
            pytest.raises(ConfigError, match="another process uses it"),
            listeners(settings(admin_key=KEY, admin_port=taken), has_keys=False),
        ):
            pass


def test_weak_admin_key_is_refused_without_its_text():
    with (
        pytest.raises(ConfigError) as refused,
        listeners(settings(admin_key=SecretStr("letmein")), has_keys=False),
    ):
        pass
    assert "admin_key must have 16" in refused.value.message
    assert "letmein" not in refused.value.message
