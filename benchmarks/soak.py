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
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.child import ServerChild, free_port
from benchmarks.stream import machine
from benchmarks.wire import EventReader
from compressor.compress.options import NO_CODER, Options
from compressor.compress.pipeline import compress

NOISE = 0.3  # of a matrix's own standard deviation: other words, still finite
RATIO = 32.0
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

References = dict[str, list[str]]  # by digest, a text for each question


@dataclass(slots=True)
class Tally:
    """What came of it all."""

    verdicts: Counter[str] = field(default_factory=Counter)
    n_tokens: int = 0
    n_unjudged: int = 0
    n_left: int = 0
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


def n_alike(references: References) -> int:
    """Pairs of a question and two digests that answer it alike, which no judge can tell apart."""
    found = 0
    for texts in zip(*references.values(), strict=True):
        found += sum(n * (n - 1) // 2 for n in Counter(texts).values())
    return found


def write_finetune(base: Path, out: Path, seed: int) -> None:
    """The base with noise on every matrix of its layers."""
    out.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and ".layers." in name:
                noise = torch.randn(tensor.shape, generator=generator) * float(tensor.std())
                tensors[name] = (tensor.float() + NOISE * noise).to(tensor.dtype)
        save_file(tensors, out / path.name, {"format": "pt"})


def write_variants(base: Path, out: Path, count: int) -> list[Path]:
    """Artifacts of so many fine-tunes."""
    made = []
    for seed in range(count):
        with tempfile.TemporaryDirectory(prefix="impart-soak-") as folder:
            write_finetune(base, Path(folder) / "finetune", seed)
            options = Options(codec="blockdiag", ratio=RATIO, entropy=NO_CODER)
            compress(base, Path(folder) / "finetune", out / f"artifact-{seed}", options)
        made.append(out / f"artifact-{seed}")
    return made


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


async def ask_alone(client: httpx.AsyncClient, names: Sequence[str]) -> References:
    """What each model answers while nothing else runs."""
    references: References = {}
    for name in names:
        texts, digest = [], ""
        for question in range(len(QUESTIONS)):
            answer = await client.post(COMPLETIONS, json=body_of(name, question))
            answer.raise_for_status()
            digest = answer.headers["x-impart-delta"]
            texts += choices_of(answer)
        references[digest] = texts
    return references


class Caller:
    """Somebody who asks one random thing after the other."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        names: Sequence[str],
        references: References,
        tally: Tally,
        seed: int,
    ) -> None:
        self._client, self._names, self._references = client, names, references
        self._tally, self._random = tally, random.Random(seed)

    async def run(self, until: float) -> None:
        """Ask until that time of the monotonic clock."""
        while time.monotonic() < until:
            await self._ask()

    async def _ask(self) -> None:
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
                await self._client.post(COMPLETIONS, json=body, timeout=patience_s)
            self._tally.n_left += 1
            return
        answer = await self._client.post(COMPLETIONS, json=body)
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


async def replace_variants(
    client: httpx.AsyncClient,
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
        (await client.post("/v1/deltas/rescan")).raise_for_status()
        tally.n_replaced += 1


async def soak(
    child: ServerChild, deltas: Path, artifacts: Sequence[Path], minutes: float
) -> tuple[Tally, References, list[int]]:
    """Soak a server that is ready; return what came of it and its memory each minute."""
    tally = Tally()
    names = [path.name for path in sorted(deltas.iterdir())]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=child.url, timeout=600.0, limits=limits) as client:
        references = await ask_alone(client, ["base", *names])
        until = time.monotonic() + 60 * minutes
        callers = [
            Caller(client, ["base", *names], references, tally, seed) for seed in range(N_CALLERS)
        ]
        replacing = asyncio.create_task(replace_variants(client, deltas, artifacts, names, tally))
        asking = asyncio.gather(*(caller.run(until) for caller in callers))
        sizes = [child.rss_bytes()]
        while not asking.done():
            await asyncio.wait({asking}, timeout=60.0)
            sizes.append(child.rss_bytes())
        await asking
        replacing.cancel()
        await asyncio.gather(replacing, return_exceptions=True)
    return tally, references, sizes


def lines(tally: Tally, references: References, sizes: Sequence[int]) -> Iterator[str]:
    """The report."""
    judged = ", ".join(
        f"{name} {tally.verdicts[name]}" for name in ("right", "wrong", "foreign", "unknown")
    )
    statuses = ", ".join(f"{count} x {code}" for code, count in sorted(tally.statuses.items()))
    yield f"answers judged: {judged}; not judged (sampled): {tally.n_unjudged}"
    yield f"at most {tally.n_tokens} tokens; left early {tally.n_left}; statuses {statuses}"
    yield f"replaced under a name: {tally.n_replaced}"
    alike = n_alike(references)
    yield f"{len(references)} digests, {len(QUESTIONS)} questions, pairs answered alike: {alike}"
    yield f"memory by the minute, MB: {', '.join(f'{size / 1e6:,.0f}' for size in sizes)}"


def run(args: argparse.Namespace) -> Tally:
    """Make the variants, start the server, soak it, print."""
    with tempfile.TemporaryDirectory(prefix="impart-soak-") as folder:
        artifacts = write_variants(args.base, Path(folder), args.variants)
        deltas = Path(folder) / "deltas"
        for number, artifact in enumerate(artifacts):
            shutil.copytree(artifact, deltas / f"variant-{number}")
        port = free_port()
        command = [sys.executable, "-m", "server", "--base", str(args.base.resolve())]
        command += ["--deltas", str(deltas), "--port", str(port), "--served-base-name", "base"]
        command += ["--dtype", "float32", "--max-resident-variants", str(args.slots)]
        command += ["--kernels", args.kernels, "--kv-cache-bytes", "256MiB"]
        with ServerChild(command, f"http://127.0.0.1:{port}", args.log.resolve()) as child:
            child.wait_ready()
            tally, references, sizes = asyncio.run(soak(child, deltas, artifacts, args.minutes))
    print("\n".join(lines(tally, references, sizes)))
    print(machine())
    return tally


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
    """Return 1 if an answer was not its digest's own."""
    tally = run(parse_args(argv))
    return int(set(tally.verdicts) != {"right"})


if __name__ == "__main__":
    sys.exit(main())
