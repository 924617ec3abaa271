"""What a request's tenant and its `priority` mean on the way into the engine."""

from __future__ import annotations

import pytest

from server.engine.schedule.admission import Admission
from server.tenants.principal import Principal
from tests.server.api.fake import BASE
from tests.server.api.tenancy import Tenancy, bearer, completion

CHAT = {"model": "alpha", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
ASKS = [("/v1/completions", completion("alpha")), ("/v1/chat/completions", CHAT)]


@pytest.mark.parametrize(("path", "body"), ASKS)
async def test_priority_goes_to_an_engine_that_schedules_by_it(tmp_path, path, body):
    tenancy = Tenancy(tmp_path, scheduling_policy="priority")
    for priority in (-5, 0, 7, None):
        asked = body | {"priority": priority}
        answer = await tenancy.call("POST", path, headers=bearer("acme"), json=asked)
        assert answer.status_code == 200, answer.text
    await tenancy.call("POST", path, headers=bearer("acme"), json=body)
    assert tenancy.engine.priorities == [-5, 0, 7, 0, 0]


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
@pytest.mark.parametrize(("path", "body"), ASKS)
async def test_priority_that_nobody_heeds_is_refused(tmp_path, path, body, policy):
    tenancy = Tenancy(tmp_path, scheduling_policy=policy)
    for priority, status in ((1, 400), (-1, 400), (0, 200), (None, 200)):
        asked = body | {"priority": priority}
        answer = await tenancy.call("POST", path, headers=bearer("acme"), json=asked)
        assert answer.status_code == status
        if status == 400:
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == ("priority", "unsupported_value")
            assert "--scheduling-policy priority" in error["message"]
    assert tenancy.engine.n_active == tenancy.engine.admission.n_open == 0


async def test_flood_of_one_tenant_does_not_close_the_server_to_another(tmp_path):
    tenancy = Tenancy(tmp_path)
    tenancy.engine.admission = Admission(max_waiting=3, max_running=1)
    flood = tenancy.engine.admission.admit(4, Principal("globex"))
    refused = await tenancy.call(
        "POST", "/v1/completions", headers=bearer("globex"), json=completion("beta")
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
    served = await tenancy.call(
        "POST", "/v1/completions", headers=bearer("acme"), json=completion(BASE, n=2)
    )
    assert served.status_code == 200
    too_many = await tenancy.call(
        "POST", "/v1/completions", headers=bearer("acme"), json=completion(BASE, n=3)
    )
    assert too_many.status_code == 503  # its share of 4 is 2.67 at weight 2 beside 1
    with flood:
        pass
    assert tenancy.engine.admission.n_open == 0
