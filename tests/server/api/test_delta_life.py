"""What administrators do with variants, over HTTP: what reaches the engine, and who may."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from server.errors import Conflict
from tests.server.api.tenancy import Tenancy, bearer

ACTIONS = ("load", "prefetch", "unload", "pin", "unpin")


@pytest.fixture
def tenancy(tmp_path):
    return Tenancy(tmp_path)


async def act(tenancy: Tenancy, path: str, **given):
    return await tenancy.call_admin("POST", f"/v1/deltas/{path}", headers=bearer("admin"), **given)


async def test_actions_reach_the_engine_and_answer_with_the_variant(tenancy):
    for path in ("alpha/load", "alpha/load", "alpha/prefetch", "alpha/unload?force=true"):
        answer = await act(tenancy, path)
        assert (answer.status_code, answer.json()["id"]) == (200, "alpha")
    assert tenancy.engine.variants.calls == [
        ("load", "alpha"), ("load", "alpha"), ("prefetch", "alpha"), ("force", "alpha"),
    ]  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS)
async def test_action_of_others_than_administrators_is_refused(tenancy, action):
    path = f"/v1/deltas/alpha/{action}"
    assert (await tenancy.call("POST", path, headers=bearer("acme"))).status_code == 403
    page = bearer("admin") | {"origin": "http://elsewhere.example"}
    assert (await tenancy.call_admin("POST", path, headers=page)).status_code == 403
    assert (await act(tenancy, f"nobody/{action}")).status_code == 404
    assert (await act(tenancy, f"tiny-base/{action}")).status_code == 404
    assert tenancy.engine.variants.calls == tenancy.engine.pinned == []


async def test_action_that_the_engine_refuses_is_a_conflict_and_audited(tmp_path):
    ledger = Mock()
    tenancy = Tenancy(tmp_path, ledger=ledger)
    await act(tenancy, "alpha/load")
    tenancy.engine.variants.error = Conflict("`alpha` is pinned. Unpin it first.")
    answer = await act(tenancy, "alpha/unload")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "conflict"
    rows = [call.args[0] for call in ledger.audit.call_args_list]
    noted = [(row.action, row.target, row.outcome) for row in rows]
    assert noted == [("load", "alpha", "ok"), ("unload", "alpha", "Conflict")]


async def test_question_that_is_none_is_refused(tenancy):
    for query in ("force=maybe", "now=true"):
        assert (await act(tenancy, f"alpha/unload?{query}")).status_code == 400
    assert tenancy.engine.variants.calls == []


async def test_load_that_takes_too_long_is_told(tmp_path):
    tenancy = Tenancy(tmp_path, request_timeout_s=0.01)
    tenancy.engine.variants.delay_s = 5.0
    answer = await act(tenancy, "alpha/load")
    assert answer.status_code == 504
    assert "took too long to load" in answer.json()["error"]["message"]
