"""Another tenant's names: by every spelling they are names that do not exist."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import pytest

from tests.attacks.conftest import Running


def foreign_names(server: Running) -> list[str]:
    data = server.admin().get("/v1/deltas").json()["data"]
    digest = next(entry["digest"] for entry in data if entry["id"] == "globex-one")
    return [
        "globex-one", "base:globex-one", "GLOBEX-one", "globex-one ", " globex-one", "globex-one/",
        "./globex-one", "../deltas/globex-one", "globex-*", "*", digest, digest[:12],
        f"globex-one@{digest[:8]}", f"base:{digest}", "globex-one\u0000", "globex\u2011one",
    ]  # fmt: skip


def test_foreign_variant_is_404_like_any_unknown_name(server: Running) -> None:
    for name in foreign_names(server):
        answers = []
        for model in (name, "z" * len(name)):
            answer = server.complete("acme", model)
            assert answer.status_code == 404, (model, answer.text)
            answers.append(answer.json()["error"]["message"].replace(model, "NAME"))
            assert server.client("acme").post(
                "/tokenize", json={"model": model, "prompt": "x"}
            ).status_code in (400, 404)
        assert answers[0] == answers[1]


def test_listings_and_answers_name_nothing_of_others(server: Running) -> None:
    server.complete("globex", "globex-one")
    for path in ("/v1/models", "/v1/deltas", "/v1/models/acme-one", "/v1/models/globex-one"):
        answer = server.client("acme").get(path)
        assert path.endswith("globex-one") or "globex" not in answer.text
        assert answer.status_code == (404 if path.endswith("globex-one") else 200)


def test_shared_prompt_is_cached_for_each_tenant_apart(server: Running) -> None:
    prompt = "The same long beginning of a prompt. " * 8

    def cached(who: str, **fields: str) -> int:
        usage = server.complete(who, "base", prompt, **fields).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("acme") == 0
    assert cached("acme") > 0
    for salt in ("", "acme", "base\nacme\n", "\nacme\n", "acme\n"):
        assert cached("globex", cache_salt=salt or "none") == 0
    assert cached("globex") == 0
    assert cached("globex") > 0


def test_request_id_of_another_is_nobodys_handle(server: Running) -> None:
    headers = {"x-request-id": "shared-id"}
    body = {"model": "acme-one", "prompt": "Hi", "max_tokens": 40, "stream": True}
    with server.client("acme").stream(
        "POST", "/v1/completions", json=body, headers=headers
    ) as running:
        lines = running.iter_lines()
        next(lines)
        other = server.client("globex").post(
            "/v1/completions",
            json={"model": "globex-one", "prompt": "Hi", "max_tokens": 2},
            headers=headers,
        )
        assert other.status_code == 200
        assert other.json()["model"] == "globex-one"
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.slow
def test_time_of_a_foreign_name_is_that_of_an_unknown_one(server: Running) -> None:
    """Medians of many in turn; a look at the disk or a load would be several times as long."""
    times: dict[str, list[float]] = {"globex-one": [], "nobody-one": []}
    for _ in range(300):
        for name, taken in times.items():
            before = perf_counter()
            server.complete("acme", name)
            taken.append(perf_counter() - before)
    foreign, unknown = (median(taken) for taken in times.values())
    assert 0.8 < foreign / unknown < 1.25


@pytest.mark.slow
def test_first_token_of_a_prompt_that_another_tenant_has_sent_comes_no_sooner(
    server: Running,
) -> None:
    """Medians of many in turn: one that is found in the cache is far below."""
    times: dict[str, list[float]] = {"shared": [], "new": [], "own": []}
    for i in range(40):
        prompts = {name: [30 + i, 100 + n] * 200 for n, name in enumerate(times)}
        server.complete("globex", "base", prompts["shared"], max_tokens=1)
        server.complete("acme", "base", prompts["own"], max_tokens=1)
        for name, prompt in prompts.items():
            before = perf_counter()
            answer = server.complete("acme", "base", prompt, max_tokens=1)
            times[name].append(perf_counter() - before)
            assert answer.status_code == 200
    medians = {name: median(taken) for name, taken in times.items()}
    assert 0.8 < medians["shared"] / medians["new"] < 1.25
    assert medians["own"] < medians["new"]
