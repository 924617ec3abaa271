r"""Minutes of everything at once; each greedy answer is compared with its digest's answer alone.

    python -m benchmarks.soak --base BASE --minutes 6

Variants are made of the base and noise, so that each answers otherwise. A server in float32 with
fewer slots than variants first answers every question for each of them, one at a time: the
references. Then several callers ask at random, streamed and whole, with common beginnings, some
with several choices, some with sampling and penalties, some that hang up; meanwhile variants are
replaced under their names. The digest that an answer's header names decides what it must be:

    wrong     text that no digest answers to this question
    foreign   text of another digest: the worst that could happen
    unknown   a digest that was never served

The callers are of two tenants, to each of which half of the variants and the base belong. They ask
the same prompts, and now and then for a variant of the other's, which must be unknown to them:

    leaked    such a request that was answered, or told apart from one for no variant at all

In the end the ledger must have a row for each answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.child import ServerChild, free_port
from benchmarks.soak_variants import write_variants
from benchmarks.stream import machine
from benchmarks.tenants import tenants_text
from benchmarks.wire import EventReader
from server.tenants.keys import new_key

N_TOKENS = 16
N_CALLERS = 6
REPLACE_EVERY_S = 3.0
PREAMBLE = "The people of the town met in the old school to talk about the year. " * 8
QUESTIONS = (
    "They said",
    "The first thing was",
    "In the morning",
    "Nobody knew why",
    "A child asked",
    "The water",
)
COMPLETIONS = "/v1/completions"
TENANTS = ("north", "south")
FOREIGN = 0.05  # of the requests are for the other tenant's variants

References = dict[str, list[str]]  # by digest, a text for each question


@dataclass(slots=True)
class Tally:
    """What came of it all."""

    verdicts: Counter[str] = field(default_factory=Counter)
    n_tokens: int = 0
    n_unjudged: int = 0
    n_left: int = 0
    n_foreign: int = 0
    n_leaked: int = 0
    n_replaced: int = 0
    statuses: Counter[int] = field(default_factory=Counter)


def verdict(references: References, digest: str, question: int, text: str) -> str:
    """Judge one greedy answer."""
    if digest not in references:
        return "unknown"
    if references[digest][question] == text:
        return "right"
    others = (texts[question] for other, texts in references.items() if other != digest)
    return "foreign" if text in others else "wrong"


@dataclass(frozen=True, slots=True)
class Access:
    """The tenants' keys and names, and the admin's key."""

    keys: dict[str, str]
    names: dict[str, list[str]]
    admin_key: str

    @classmethod
    def of(cls, names: Sequence[str]) -> Access:
        """Give every other name to the same tenant."""
        n = len(TENANTS)
        split = {tenant: ["base", *names[i::n]] for i, tenant in enumerate(TENANTS)}
        return cls({tenant: new_key() for tenant in TENANTS}, split, new_key())

    def file_text(self) -> str:
        """The tenants file."""
        settings = {tenant: {"variants": names} for tenant, names in self.names.items()}
        return tenants_text(self.keys, settings)

    def headers(self, tenant: str) -> dict[str, str]:
        """What a request of the tenant carries."""
        return {"authorization": f"Bearer {self.keys[tenant]}"}


def n_alike(references: References) -> int:
    """Pairs of a question and two digests that answer it alike, which no judge can tell apart."""
    found = 0
    for texts in zip(*references.values(), strict=True):
        found += sum(n * (n - 1) // 2 for n in Counter(texts).values())
    return found


def body_of(model: str, question: int, **fields: Any) -> dict[str, Any]:
    """A request; greedy unless the fields say otherwise."""
    prompt = PREAMBLE + QUESTIONS[question]
    return {"model": model, "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0} | fields


def choices_of(answer: httpx.Response) -> list[str]:
    """The text of each choice, of a stream or a whole answer."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return [choice["text"] for choice in answer.json()["choices"]]
    events: list[bytes] = []
    EventReader(events.append).feed(answer.content)
    texts: dict[int, str] = {}
    for event in events:
        if event != b"[DONE]":
            for choice in json.loads(event)["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [texts[index] for index in sorted(texts)]


async def ask_alone(client: httpx.AsyncClient, access: Access) -> References:
    """What each model answers while nothing else runs."""
    references: References = {}
    asked = [(tenant, name) for tenant, names in access.names.items() for name in names]
    for tenant, name in asked:
        texts, digest = [], ""
        headers = access.headers(tenant)
        for question in range(len(QUESTIONS)):
            body = body_of(name, question)
            answer = await client.post(COMPLETIONS, json=body, headers=headers)
            answer.raise_for_status()
            digest = answer.headers["x-impart-delta"]
            texts += choices_of(answer)
        references[digest] = texts
    return references


class Caller:
    """Somebody of a tenant who asks one random thing after the other."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        access: Access,
        references: References,
        tally: Tally,
        seed: int,
    ) -> None:
        self._client, self._references = client, references
        self._tally, self._random = tally, random.Random(seed)
        tenant = TENANTS[seed % len(TENANTS)]
        self._names, self._headers = access.names[tenant], access.headers(tenant)
        others = {name for names in access.names.values() for name in names}
        self._foreign = sorted(others - set(self._names))

    async def run(self, until: float) -> None:
        """Ask until that time of the monotonic clock."""
        while time.monotonic() < until:
            await self._ask()

    async def _ask(self) -> None:
        if self._foreign and self._random.random() < FOREIGN:
            await self._ask_for_foreign(self._random.choice(self._foreign))
            return
        model = self._random.choice(self._names)
        question = self._random.randrange(len(QUESTIONS))
        kind = self._random.random()
        fields: dict[str, Any] = {"stream": self._random.random() < 0.5}
        if kind < 0.2:
            fields |= {"n": 2}
        elif kind < 0.4:
            fields |= {"temperature": 1.0, "repetition_penalty": 1.2, "stop": ["the"]}
        body = body_of(model, question, **fields)
        if kind > 0.85:
            with suppress(httpx.TimeoutException):
                patience_s = self._random.uniform(0.01, 1.0)
                await self._post(body, timeout=patience_s)
            self._tally.n_left += 1
            return
        answer = await self._post(body)
        self._tally.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            return
        texts = choices_of(answer)
        self._tally.n_tokens += N_TOKENS * len(texts)
        if body["temperature"]:
            self._tally.n_unjudged += len(texts)
            return
        digest = answer.headers["x-impart-delta"]
        for text in texts:
            self._tally.verdicts[verdict(self._references, digest, question, text)] += 1

    async def _ask_for_foreign(self, name: str) -> None:
        """It must be answered as a name that there is not."""
        foreign, unknown = [
            await self._post(body_of(model, 0)) for model in (name, "x" * len(name))
        ]
        self._tally.n_foreign += 1
        alike = foreign.text.replace(name, "x" * len(name)) == unknown.text
        self._tally.n_leaked += foreign.status_code != 404 or not alike

    async def _post(self, body: dict[str, Any], **given: Any) -> httpx.Response:
        return await self._client.post(COMPLETIONS, json=body, headers=self._headers, **given)


async def replace_variants(
    admin: httpx.AsyncClient,
    deltas: Path,
    artifacts: Sequence[Path],
    names: Sequence[str],
    tally: Tally,
) -> None:
    """Put another artifact under one of the names, again and again."""
    choose = random.Random(0)
    while True:
        await asyncio.sleep(REPLACE_EVERY_S)
        name, artifact = choose.choice(names), choose.choice(artifacts)
        coming, going = deltas.parent / "coming", deltas.parent / "going"
        await asyncio.to_thread(shutil.copytree, artifact, coming)
        (deltas / name).rename(going)
        coming.rename(deltas / name)
        await asyncio.to_thread(shutil.rmtree, going)
        (await admin.post("/v1/deltas/rescan")).raise_for_status()
        tally.n_replaced += 1


async def soak(
    child: ServerChild,
    admin_url: str,
    access: Access,
    deltas: Path,
    artifacts: Sequence[Path],
    minutes: float,
) -> tuple[Tally, References, list[int]]:
    """Soak a server that is ready; return what came of it and its memory each minute."""
    tally = Tally()
    names = [path.name for path in sorted(deltas.iterdir())]
    limits = httpx.Limits(max_connections=None)
    admin_headers = {"authorization": f"Bearer {access.admin_key}"}
    async with (
        httpx.AsyncClient(base_url=child.url, timeout=600.0, limits=limits) as client,
        httpx.AsyncClient(base_url=admin_url, timeout=600.0, headers=admin_headers) as admin,
    ):
        references = await ask_alone(client, access)
        tally.statuses[200] += len(references) * len(QUESTIONS)
        until = time.monotonic() + 60 * minutes
        callers = [Caller(client, access, references, tally, seed) for seed in range(N_CALLERS)]
        replacing = asyncio.create_task(replace_variants(admin, deltas, artifacts, names, tally))
        asking = asyncio.gather(*(caller.run(until) for caller in callers))
        sizes = [child.rss_bytes()]
        while not asking.done():
            await asyncio.wait({asking}, timeout=60.0)
            sizes.append(child.rss_bytes())
        await asking
        replacing.cancel()
        await asyncio.gather(replacing, return_exceptions=True)
    return tally, references, sizes


def ledger_statuses(state: Path) -> dict[int, int]:
    """Rows of each HTTP status in the ledger of a server that has ended."""
    with closing(sqlite3.connect(state / "ledger.db")) as database:
        return dict(database.execute("SELECT status, count(*) FROM requests GROUP BY status"))


def lines(
    tally: Tally, references: References, sizes: Sequence[int], rows: Mapping[int, int]
) -> Iterator[str]:
    """The report."""
    judged = ", ".join(
        f"{name} {tally.verdicts[name]}" for name in ("right", "wrong", "foreign", "unknown")
    )
    statuses = ", ".join(f"{count} x {code}" for code, count in sorted(tally.statuses.items()))
    ledger = ", ".join(f"{count} x {code}" for code, count in sorted(rows.items()))
    yield f"answers judged: {judged}; not judged (sampled): {tally.n_unjudged}"
    yield f"at most {tally.n_tokens} tokens; left early {tally.n_left}; statuses {statuses}"
    yield f"asked for the other tenant's variants: {tally.n_foreign}, leaked {tally.n_leaked}"
    yield f"rows of the ledger: {ledger}"
    yield f"replaced under a name: {tally.n_replaced}"
    alike = n_alike(references)
    yield f"{len(references)} digests, {len(QUESTIONS)} questions, pairs answered alike: {alike}"
    yield f"memory by the minute, MB: {', '.join(f'{size / 1e6:,.0f}' for size in sizes)}"


def is_clean(tally: Tally, rows: Mapping[int, int]) -> bool:
    """Whether each answer was its digest's own, nothing leaked, and the ledger has them all; that
    of a caller who left may have been whole by then.
    """
    judged = set(tally.verdicts) == {"right"} and tally.n_leaked == 0
    answered = tally.statuses[200]
    return judged and answered <= rows.get(200, 0) <= answered + tally.n_left


def run(args: argparse.Namespace) -> bool:
    """Make the variants, start the server, soak it, print; whether all was well."""
    with tempfile.TemporaryDirectory(prefix="impart-soak-") as name:
        folder = Path(name)
        artifacts = write_variants(args.base, folder, args.variants)
        deltas, state = folder / "deltas", folder / "state"
        for number, artifact in enumerate(artifacts):
            shutil.copytree(artifact, deltas / f"variant-{number}")
        access = Access.of([path.name for path in sorted(deltas.iterdir())])
        (folder / "tenants.toml").write_text(access.file_text())
        port, admin_port = free_port(), free_port()
        command = [sys.executable, "-m", "server", "--base", str(args.base.resolve())]
        command += ["--deltas", str(deltas), "--port", str(port), "--served-base-name", "base"]
        command += ["--dtype", "float32", "--max-resident-variants", str(args.slots)]
        command += ["--kernels", args.kernels, "--kv-cache-bytes", "256MiB"]
        command += ["--tenants", str(folder / "tenants.toml"), "--state-dir", str(state)]
        command += ["--admin-key", access.admin_key, "--admin-port", str(admin_port)]
        admin_url = f"http://127.0.0.1:{admin_port}"
        with ServerChild(command, f"http://127.0.0.1:{port}", args.log.resolve()) as child:
            child.wait_ready()
            found = soak(child, admin_url, access, deltas, artifacts, args.minutes)
            tally, references, sizes = asyncio.run(found)
        rows = ledger_statuses(state)
    print("\n".join(lines(tally, references, sizes, rows)))
    print(machine())
    return is_clean(tally, rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--minutes", type=float, default=6.0)
    add("--variants", type=int, default=6)
    add("--slots", type=int, default=2)
    add("--kernels", default="auto")
    add("--log", type=Path, default=Path(".cache/bench/soak.log"), help="the server's output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if an answer was not its digest's own, or not its tenant's, or is in no ledger."""
    return int(not run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
