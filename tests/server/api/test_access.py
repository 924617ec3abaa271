"""A tenant sees its own models; another's are like names that do not exist."""

from __future__ import annotations

import pytest

from tests.server.api.fake import BASE
from tests.server.api.tenancy import Tenancy, bearer, completion


@pytest.fixture
def tenancy(tmp_path):
    return Tenancy(tmp_path)


def asks(model: str) -> list[tuple[str, str, dict[str, object]]]:
    chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    return [
        ("POST", "/v1/completions", completion(model)),
        ("POST", "/v1/completions", completion(model, stream=True)),
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/tokenize", {"model": model, "prompt": "x"}),
        ("POST", "/detokenize", {"model": model, "tokens": [65]}),
    ]


@pytest.mark.parametrize("foreign", ["beta", "broken", f"{BASE}:beta", "BETA", "b*"])
async def test_foreign_model_is_answered_as_an_unknown_one(tenancy, foreign):
    asked: list[str] = []
    opened = tenancy.engine.open

    async def open_noted(model: str, *caller: object):
        asked.append(model)
        return await opened(model, *caller)

    tenancy.engine.open = open_noted
    unknown = "x" * len(foreign)
    for (method, path, body), (_, _, other) in zip(asks(foreign), asks(unknown), strict=True):
        answer = await tenancy.call(method, path, headers=bearer("acme"), json=body)
        like = await tenancy.call(method, path, headers=bearer("acme"), json=other)
        assert answer.status_code == like.status_code == 404
        assert answer.text.replace(foreign, unknown) == like.text
        assert dict(answer.headers).keys() == dict(like.headers).keys()
    assert foreign not in asked  # nothing of it was looked at
    for name in (foreign, unknown):
        answer = await tenancy.call("GET", f"/v1/models/{name}", headers=bearer("acme"))
        assert answer.status_code == 404
        assert name in answer.json()["error"]["message"]


async def test_own_models_work_under_both_names(tenancy):
    for model in ("alpha", f"{BASE}:alpha", BASE):
        for method, path, body in asks(model):
            answer = await tenancy.call(method, path, headers=bearer("acme"), json=body)
            assert answer.status_code == 200, (path, answer.text)


async def test_own_broken_model_says_so_and_anothers_does_not(tenancy):
    for who, status in (("globex", 424), ("acme", 404)):
        answer = await tenancy.call(
            "POST", "/v1/completions", headers=bearer(who), json=completion("broken")
        )
        assert answer.status_code == status


@pytest.mark.parametrize(
    ("who", "models"), [("acme", {BASE, "alpha"}), ("globex", {"beta", "broken"})]
)
async def test_listings_show_a_tenants_own_and_the_admin_all(tenancy, who, models):
    listed = (await tenancy.call("GET", "/v1/models", headers=bearer(who))).json()["data"]
    assert {entry["id"] for entry in listed} == models
    deltas = (await tenancy.call("GET", "/v1/deltas", headers=bearer(who))).json()["data"]
    assert {entry["id"] for entry in deltas} == models - {BASE}
    everything = await tenancy.call_admin("GET", "/v1/models", headers=bearer("admin"))
    assert {entry["id"] for entry in everything.json()["data"]} == {
        BASE, "alpha", "beta", "broken",
    }  # fmt: skip
