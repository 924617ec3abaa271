r"""What hostile input costs those who have nothing to do with it.

    python -m benchmarks.hostile --base BASE --deltas deploy/demo/deltas \
        --checkout before=../other-checkout --checkout here=.

For each attack every checkout's server is started afresh. A stream of the base runs, and every half
second somebody sends a short chat to the base. After some quiet seconds the attack begins; it
lasts until its requests have been answered or their time is up. Told of each:

    gap      p99 and longest time between two tokens of the stream, quiet and attacked; where the
             server has died, how long the stream had lived
    loop     processor time of the event loop's thread that the attack took: what it used in all,
             less what the quiet seconds let expect. Other processes of the machine do not change
             it, unlike the gaps
    chats    how many of the short chats were answered, and the longest that one of them took
    memory   how much the server and its children grew
    answers  what the attacker got
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.child import PeakRss, ServerChild, free_port
from benchmarks.stream import Stream, gaps_between, machine, replace_files

SETTLE_S = 1.0
PROBE_EVERY_S = 0.5
PROBE_TIMEOUT_S = 60.0
NO_ANSWER = "no answer"

TEMPLATES = {
    "computes": "{{ 7 ** 30000000 % 7 }}",
    "large": "{{ 'ab ' * 30000000 }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}
ADDED_TOKENS = 100_000


@dataclass(slots=True)
class Target:
    """The server under attack, and how long an attacker waits."""

    url: str
    patience_s: float
    answers: Counter[str] = field(default_factory=Counter)

    async def post(self, path: str, body: bytes | dict[str, Any]) -> None:
        """Send one request and note what came of it."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=self.patience_s) as client:
                answer = await client.post(path, content=content, headers=headers)
            self.answers[str(answer.status_code)] += 1
        except httpx.HTTPError:
            self.answers[NO_ANSWER] += 1

    async def chat(self, model: str, content: str) -> None:
        """One token of a chat."""
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, "max_tokens": 1}
        await self.post("/v1/chat/completions", body)


Attack = Callable[[Target], Awaitable[object]]


async def _one_template(target: Target, name: str) -> None:
    await target.chat(name, "hello")


async def _looping_templates(target: Target) -> None:
    await asyncio.gather(*(target.chat("loops", "hello") for _ in range(4)))


async def _large_chats(target: Target) -> None:
    text = "some words of a long chat " * 80_000  # 2 MB
    await asyncio.gather(*(target.chat("base", text) for _ in range(8)))


async def _bodies(target: Target, filler: bytes) -> None:
    body = b'{"model": "base", "max_tokens": 1, ' + filler + b"}"
    for _ in range(6):
        await target.post("/v1/completions", body)


async def _prompts_left(target: Target) -> None:
    """Prompts of two million characters whose senders hang up."""
    body = {"model": "base", "prompt": "word " * 400_000, "max_tokens": 1}
    hasty = Target(target.url, 0.5, target.answers)
    await asyncio.gather(*(hasty.post("/v1/completions", body) for _ in range(12)))
    await asyncio.sleep(10)


async def _unread_answers(target: Target) -> None:
    """Ten connections that ask for ten whole answers each, about a megabyte, and read nothing."""
    host, _, port = target.url.removeprefix("http://").partition(":")
    async with httpx.AsyncClient(base_url=target.url, timeout=target.patience_s) as client:
        models = (await client.get("/v1/models")).json()["data"]
    n_tokens = 2 * next(model["max_model_len"] for model in models if model["id"] == "base")
    body = json.dumps({"model": "base", "tokens": [1000] * n_tokens}).encode()
    head = f"POST /detokenize HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    request = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    writers = []
    for _ in range(10):
        narrow = socket.socket()  # else the system takes the answers
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(narrow, (host, int(port)))
        _, writer = await asyncio.open_connection(sock=narrow, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request * 10)
        writers.append(writer)
    await asyncio.sleep(min(30.0, target.patience_s))
    for writer in writers:
        target.answers["closed by the server" if writer.transport.is_closing() else "kept"] += 1
        writer.transport.abort()


def attacks() -> dict[str, Attack]:
    """By name, in the order they are made."""
    lists = b'"prompt": [' + b",".join([b"[1]"] * 1_000_000) + b"]"
    keys = b",".join(b'"key%d": 1' % number for number in range(250_000))
    return {
        "template that computes": lambda t: _one_template(t, "computes"),
        "template that renders 90 MB": lambda t: _one_template(t, "large"),
        "four templates that loop": _looping_templates,
        "eight chats of 2 MB": _large_chats,
        "six bodies of a million lists": lambda t: _bodies(t, lists),
        "six bodies of 250,000 keys": lambda t: _bodies(t, b'"prompt": "x", ' + keys),
        "twelve prompts of 2 MB, left": _prompts_left,
        "ten answers that nobody reads": _unread_answers,
        "tokenizer of 100,000 added tokens": lambda t: _one_template(t, "tokenizer"),
    }


def write_artifacts(source: Path, base: Path, folder: Path) -> None:
    """Artifacts that are whole, each with a file that costs who uses it."""
    original = sorted(path for path in source.iterdir() if (path / "SHA256SUMS").is_file())[0]
    for name, template in TEMPLATES.items():
        shutil.copytree(original, folder / name)
        replace_files(folder / name, {"chat_template.jinja": template.encode()})
    shutil.copytree(original, folder / "tokenizer")
    tokenizer = json.loads((base / "tokenizer.json").read_bytes())
    first = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    first = max(first, 1 + max(tokenizer["model"]["vocab"].values()))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [
        {"id": first + number, "content": f"<added number {number}>"} | flags
        for number in range(ADDED_TOKENS)
    ]
    replace_files(folder / "tokenizer", {"tokenizer.json": json.dumps(tokenizer).encode()})


@dataclass(frozen=True, slots=True)
class Felt:
    """What one attack did. Gaps in seconds; `lived_s` is set if the server died, `loop_s` is None
    where the system does not tell.
    """

    quiet: list[float]
    attacked: list[float]
    chats_s: list[float]
    chats_failed: int
    grown_bytes: int
    answers: Counter[str]
    loop_s: float | None = None
    lived_s: float | None = None


class Probe:
    """Somebody who sends a short chat to the base every half second."""

    def __init__(self, url: str) -> None:
        self.took_s: list[float] = []
        self.failed = 0
        self._client = httpx.AsyncClient(base_url=url, timeout=PROBE_TIMEOUT_S)
        self._asks: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            ask = asyncio.create_task(self._ask())
            self._asks.add(ask)
            ask.add_done_callback(self._asks.discard)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _ask(self) -> None:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "base", "messages": messages, "max_tokens": 1}
        began = time.perf_counter()
        try:
            answer = await self._client.post("/v1/chat/completions", json=body)
            self.failed += answer.status_code != 200
        except httpx.HTTPError:
            self.failed += 1
        self.took_s.append(time.perf_counter() - began)

    async def leave(self) -> None:
        """Send no more; wait for those under way."""
        self._task.cancel()
        await asyncio.gather(self._task, *self._asks, return_exceptions=True)
        await self._client.aclose()


async def measure(child: ServerChild, attack: Attack, quiet_s: float, patience_s: float) -> Felt:
    """Attack a server that is ready."""
    target = Target(child.url, patience_s)
    await target.chat("base", "hello")
    target.answers.clear()
    stream = Stream(child.url, list(range(1000, 1016)))
    await asyncio.sleep(SETTLE_S)
    pid = child.process.pid
    began, loop_began = time.perf_counter(), loop_cpu_s(pid)
    quiet_probe = Probe(child.url)
    await asyncio.sleep(quiet_s)
    await quiet_probe.leave()
    attacked, loop_attacked = time.perf_counter(), loop_cpu_s(pid)
    probe, before = Probe(child.url), child.rss_bytes()
    with PeakRss(child) as peak:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(attack(target), patience_s + 10)
        ended, loop_ended = time.perf_counter(), loop_cpu_s(pid)
        await probe.leave()
    died = child.process.poll() is not None or stream.ended
    arrivals = list(stream.arrivals_s)
    if not died:
        await stream.leave()
    return Felt(
        quiet=gaps_between(arrivals, began, attacked),
        attacked=gaps_between([*arrivals, ended], attacked, ended),
        chats_s=probe.took_s,
        chats_failed=probe.failed,
        grown_bytes=max(0, peak.n_bytes - before),
        answers=target.answers,
        loop_s=extra((began, attacked, ended), (loop_began, loop_attacked, loop_ended)),
        lived_s=arrivals[-1] - attacked if died and arrivals else None,
    )


def loop_cpu_s(pid: int) -> float | None:
    """Processor time of a process's first thread, which is the event loop's, so far."""
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def extra(times_s: Sequence[float], used_s: Sequence[float | None]) -> float | None:
    """What was used between the second and the third time, beyond the pace of the time before."""
    began, attacked, ended = used_s
    if began is None or attacked is None or ended is None:
        return None
    pace = (attacked - began) / (times_s[1] - times_s[0])
    return ended - attacked - pace * (times_s[2] - times_s[1])


def run(checkout: Path, args: argparse.Namespace, deltas: Path, attack: Attack) -> Felt:
    """Start the checkout's server and attack it."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--base", str(args.base.resolve())]
    command += ["--deltas", str(deltas), "--port", str(port), "--served-base-name", "base"]
    url = f"http://127.0.0.1:{port}"
    with ServerChild(command, url, args.log.resolve(), checkout.resolve()) as child:
        child.wait_ready()
        return asyncio.run(measure(child, attack, args.quiet_s, args.patience_s))


def row(attack: str, label: str, felt: Felt) -> str:
    """One line of the table."""

    def ms(gaps: Sequence[float]) -> str:
        if not gaps:
            return "none"
        return f"{1e3 * float(np.percentile(gaps, 99)):.0f} / {1e3 * max(gaps):.0f}"

    attacked = ms(felt.attacked)
    if felt.lived_s is not None:
        attacked = f"**died** after {felt.lived_s:.1f} s"
    n_answered = len(felt.chats_s) - felt.chats_failed
    longest = f"{max(felt.chats_s):.1f} s" if felt.chats_s else ""
    answers = ", ".join(f"{count} x {what}" for what, count in sorted(felt.answers.items()))
    cells = [
        attack,
        label,
        ms(felt.quiet),
        attacked,
        "" if felt.loop_s is None else f"{felt.loop_s:.2f}",
        f"{n_answered} of {len(felt.chats_s)}, {longest}",
    ]
    return f"| {' | '.join([*cells, f'{felt.grown_bytes / 1e6:,.0f}', answers])} |"


def rows(args: argparse.Namespace) -> Iterator[str]:
    """Every attack on every checkout, in turn."""
    checkouts = dict(pair.split("=", 1) for pair in args.checkout or ["here=."])
    chosen = {name: attack for name, attack in attacks().items() if args.only in name}
    with tempfile.TemporaryDirectory(prefix="impart-hostile-") as folder:
        write_artifacts(args.deltas, args.base, Path(folder))
        for name, attack in chosen.items():
            for label, checkout in checkouts.items():
                yield row(name, label, run(Path(checkout), args, Path(folder), attack))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hostile", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True)
    add("--deltas", type=Path, required=True, help="artifacts of this base; the first is copied")
    add("--checkout", action="append", help="LABEL=FOLDER, repeatable; default: here=.")
    add("--only", default="", help="attacks whose name holds this text")
    add("--quiet-s", type=float, default=4.0)
    add("--patience-s", type=float, default=40.0, help="how long an attacker waits for an answer")
    add("--log", type=Path, default=Path(".cache/bench/server.log"), help="the server's output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the method's table and the machine."""
    args = parse_args(argv)
    print("| attack | server | quiet p99 / max ms | attacked p99 / max ms | loop CPU s | "
          "other chats answered, longest | grown MB | the attacker's answers |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for line in rows(args):
        print(line, flush=True)
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
