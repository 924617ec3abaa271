"""Keys: wrong, cut, changed, twice, elsewhere. Nothing of it lets in, and none is ever written."""

from __future__ import annotations

import pytest

from tests.attacks.conftest import KEYS, Running

ACME = KEYS["acme"].encode()


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"Authorization: Bearer " + ACME[:-1] + b"\r\n",
        b"Authorization: Bearer " + ACME.upper() + b"\r\n",
        b"Authorization: Bearer " + ACME + b"\x00\r\n",
        b"Authorization: Bearer " + ACME + b"\xc3\xa9\r\n",
        b"Authorization: Bearer \xff\xfe\r\n",
        b"Authorization: Bearer " + b"A" * 4000 + b"\r\n",
        b"Authorization: Basic " + ACME + b"\r\n",
        b"Authorization: " + ACME + b"\r\n",
        b"Authorization: Bearer " + ACME + b"\r\nAuthorization: Bearer wrong\r\n",
        b"Authorization: Bearer wrong\r\nAuthorization: Bearer " + ACME + b"\r\n",
        b"Authorization: Bearer " + ACME + b"\r\nauthorization: Bearer " + ACME + b"\r\n",
        b"Authorization : Bearer " + ACME + b"\r\n",
        b"Authorization:\r\n Bearer " + ACME + b"\r\n",
        b"X-Api-Key: " + ACME + b"\r\n",
        b"Proxy-Authorization: Bearer " + ACME + b"\r\n",
    ],
)
@pytest.mark.parametrize("target", ["/v1/models", f"/v1/models?key={KEYS['acme']}&api_key=x"])
def test_key_that_is_wrong_or_elsewhere_never_lets_in(
    server: Running, lines: bytes, target: str
) -> None:
    answer = server.raw(
        f"GET {target} HTTP/1.1\r\nHost: x\r\n".encode() + lines + b"Connection: close\r\n\r\n"
    )
    status = answer.split(b" ", 2)[1]
    assert status in (b"401", b"400"), answer
    assert ACME not in answer


def test_refusal_says_how_and_nothing_else(server: Running) -> None:
    answer = server.client(None).get("/v1/models")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_no_key_is_in_the_log(server: Running) -> None:
    server.client("acme").get(f"/v1/models?key={KEYS['globex']}")
    server.client(None).get("/v1/models", headers={"authorization": "Bearer stolen-secret-123"})
    assert server.said("GET other 401")
    text = server.log.read_text()
    assert "tenant=acme key_id=one" in text
    assert not any(key in text for key in (*KEYS.values(), "stolen-secret-123"))
