"""The demo: one server, one base model, two full fine-tunes as deltas, one mixed batch.

Starts ``python -m server`` as a child, sends requests for the base and every variant at the same
time, and prints what each answered, how fast, and what each variant costs in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.child import ChildError, ServerChild, free_port

INTENT = "Classify the banking request.\nRequest: {}\nIntent:"
SLOTS = "Extract the booking slots as JSON.\nMessage: {}\nSlots:"
BANKING = (
    "I paid for lunch twice with the same card, can you look into it?",
    "The cash machine swallowed my card this morning.",
    "How many euros will I get for my pounds today?",
)
RESTAURANT = (
    "Hi, a table for four tomorrow at 7:30 pm please, my name is Alvarez.",
    "We would like to come on Friday evening, there are six of us.",
    "Can I move my reservation to half past eight?",
)
CHAT = "In one sentence: what is a good name for a friendly bakery?"
MAX_TOKENS = 48
READY_S = 900  # seconds on two idle cores, minutes on one that many share
COMPILING = 'impart_kernel_state{state="compiling"} 1.0'


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the sentence is what a person reads, the prompt what the model was taught."""

    model: str
    sentence: str
    prompt: str | None  # None: a chat request


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    n_tokens: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """From sending to the last token."""
        return self.end_s - self.start_s


def asks(base: str) -> Iterator[Ask]:
    """The requests: the fine-tunes in their own prompt formats, the base on both and in a chat."""
    for sentence in BANKING:
        yield Ask("intent", sentence, INTENT.format(sentence))
    for sentence in RESTAURANT:
        yield Ask("slots", sentence, SLOTS.format(sentence))
    yield Ask(base, BANKING[0], INTENT.format(BANKING[0]))
    yield Ask(base, CHAT, None)


async def send(http: httpx.AsyncClient, ask: Ask, max_tokens: int = MAX_TOKENS) -> Answer:
    """Send one request and wait for the whole answer."""
    body: dict[str, Any] = {"model": ask.model, "max_tokens": max_tokens, "temperature": 0}
    start = time.perf_counter()
    if ask.prompt is None:
        body["messages"] = [{"role": "user", "content": ask.sentence}]
        reply = await http.post("/v1/chat/completions", json=body)
    else:
        reply = await http.post("/v1/completions", json=body | {"prompt": ask.prompt})
    if reply.status_code != 200:
        raise ChildError(f"{ask.model}: HTTP {reply.status_code}: {reply.text}")
    content = reply.json()
    choice = content["choices"][0]
    text = choice["message"]["content"] if ask.prompt is None else choice["text"]
    n_tokens = content["usage"]["completion_tokens"]
    return Answer(text.strip(), n_tokens, start, time.perf_counter())


async def warm(http: httpx.AsyncClient, model: str) -> float:
    """Make one token, which loads the model's delta; return seconds."""
    return (await send(http, Ask(model, "", "Hello"), max_tokens=1)).seconds


async def converse(url: str, console: Console) -> None:
    """First one token per model, which loads the deltas; then all requests in one batch."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        cards = (await http.get("/v1/models")).json()["data"]
        base = next(card["id"] for card in cards if card["parent"] is None)
        served = {card["id"] for card in cards}
        todo = list(asks(base))
        if missing := {ask.model for ask in todo} - served:
            raise ChildError(f"not served: {', '.join(sorted(missing))}; see --deltas")
        for model in dict.fromkeys(ask.model for ask in todo):
            console.print(f"[bold]{model}[/]: first token after {await warm(http, model):.2f} s")
        answers = await asyncio.gather(*(send(http, ask) for ask in todo))
        show_answers(console, todo, answers)
        if await is_compiling(http):
            console.print(
                "torch computed these: kernels for this CPU are compiled at a first start, beside "
                "what is served; then the requests are sent again to see how fast they are"
            )
            await until_compiled(http)
            answers = await asyncio.gather(*(send(http, ask) for ask in todo))
        await show_memory(console, http, base, todo, answers)


async def is_compiling(http: httpx.AsyncClient) -> bool:
    """Whether the server still waits for its compiled kernels."""
    return COMPILING in (await http.get("/metrics")).text


async def until_compiled(http: httpx.AsyncClient) -> None:
    """Wait until the compiled kernels have taken over, or the server has given them up."""
    end = time.monotonic() + READY_S
    while await is_compiling(http):
        if time.monotonic() > end:
            raise ChildError(f"the kernels were not compiled within {READY_S} s")
        await asyncio.sleep(1)


def show_answers(console: Console, todo: list[Ask], answers: list[Answer]) -> None:
    """Print prompt -> answer, grouped by model."""
    table = Table(title=f"{len(todo)} requests at once, one batch", show_lines=False, expand=True)
    for heading, ratio in (("model", None), ("request", 5), ("answer", 6)):
        table.add_column(heading, ratio=ratio, overflow="fold", no_wrap=False)
    for ask, answer in zip(todo, answers, strict=True):
        table.add_row(ask.model, escape(ask.sentence), escape(answer.text.replace("\n", " ")))
    console.print(table)


async def show_memory(
    console: Console,
    http: httpx.AsyncClient,
    base: str,
    todo: list[Ask],
    answers: list[Answer],
) -> None:
    """Print speed and bytes per model, and what the deltas save."""
    listed = (await http.get("/v1/deltas")).json()["data"]
    deltas = {delta["id"]: delta for delta in listed}
    table = Table(title="per model")
    for heading in ("model", "delta", "codec", "on disk", "in memory", "tokens", "tokens/s"):
        left = heading in ("model", "delta", "codec")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for model in dict.fromkeys(ask.model for ask in todo):
        mine = [a for ask, a in zip(todo, answers, strict=True) if ask.model == model]
        tokens, speed = _speed(mine)
        delta = deltas.get(model)
        cells = ("-", "-", "-", "-")
        if delta is not None:
            cells = (
                delta["digest"][:8],
                delta["codec"],
                _mb(delta["bytes"]),
                _mb(delta["resident_bytes"]),
            )
        table.add_row(model, *cells, tokens, speed)
    table.add_row("all", "", "", "", "", *_speed(answers), style="bold")
    console.print(table)


def _speed(answers: list[Answer]) -> tuple[str, str]:
    tokens = sum(answer.n_tokens for answer in answers)
    seconds = max(a.end_s for a in answers) - min(a.start_s for a in answers)
    return str(tokens), f"{tokens / seconds:.0f}"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def check_inputs(base: Path, deltas: Path) -> None:
    """Stop with the remedy if a model is missing."""
    if not (base / "config.json").exists():
        sys.exit(f"no base model in {base}: `make demo` makes it")
    for name in ("intent", "slots"):
        if not (deltas / name / "delta_config.json").exists():
            sys.exit(f"no delta {deltas / name}: it comes with the repository")


def main() -> int:
    """Command line; DEMO_ONCE=1 stops after the answers, otherwise Ctrl-C does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--deltas", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    args = parser.parse_args()
    check_inputs(args.base, args.deltas)
    port = args.port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "--base", str(args.base)]
    command += ["--deltas", str(args.deltas), "--host", "127.0.0.1", "--port", str(port)]
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale cannot print is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is stopped too
    try:
        with ServerChild(
            command, url, Path(".cache/demo/server.log"), compile_kernels="background"
        ) as child:
            console.print(f"server starting at {url} (log: {child.log})")
            console.print(f"ready after {child.wait_ready(READY_S):.1f} s")
            asyncio.run(converse(url, console))
            if os.environ.get("DEMO_ONCE") != "1":
                console.print(f"the server goes on at {url}; Ctrl-C stops it")
                child.process.wait()
                raise ChildError(f"the server stopped{child.tail()}")
            console.print("stopping the server")
            status = child.stop()
            if status != 0:
                raise ChildError(f"the server exited with {status}{child.tail()}")
    except ChildError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print("\nstopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
