"""A stream that runs while something else happens to its server, and what its reader feels."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.wire import EventReader, HttpClient
from compressor.artifact.files import CHECKSUMS, format_checksums
from compressor.usable_cpus import usable_cpus

STREAM_TOKENS = 4000  # more than the phases take; the stream is left when they are over


class Stream:
    """A running stream of the base. `arrivals_s` grows with every token."""

    def __init__(self, url: str, prompt: list[int]) -> None:
        self.arrivals_s: list[float] = []
        self._client = HttpClient(url, timeout_s=600.0)
        body = {"model": "base", "prompt": prompt, "max_tokens": STREAM_TOKENS, "stream": True}
        body |= {"temperature": 0.0, "ignore_eos": True}
        reader = EventReader(lambda _: self.arrivals_s.append(time.perf_counter()))
        self._sent = asyncio.create_task(self._client.post("/v1/completions", body, reader.feed))

    @property
    def ended(self) -> bool:
        """Whether the server has ended it, by its death for instance."""
        return self._sent.done()

    async def leave(self) -> None:
        """Hang up. Stops the program if the stream had ended before: figures would be empty."""
        if self._sent.done():
            raise SystemExit(f"the stream ended before the phases did: {self._sent.result()}")
        self._sent.cancel()
        await asyncio.gather(self._sent, return_exceptions=True)
        await self._client.close()


def gaps_between(arrivals: Sequence[float], start_s: float, end_s: float) -> list[float]:
    """The gaps between successive arrivals that overlap ``[start_s, end_s]``."""
    return [late - early for early, late in pairwise(arrivals) if late > start_s and early < end_s]


def replace_files(artifact: Path, files: Mapping[str, bytes]) -> None:
    """Write these files of an artifact, and make its checksums right again."""
    lines = (artifact / CHECKSUMS).read_text().splitlines()
    sums = {line[66:]: line[:64] for line in lines}
    for name, content in files.items():
        (artifact / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    (artifact / CHECKSUMS).write_bytes(format_checksums(sums))


def machine() -> str:
    """What this ran on, in a line."""
    model = ""
    if Path("/proc/cpuinfo").is_file():
        fields = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        known = {field[0].strip(): field[1].strip() for field in fields if len(field) == 2}
        model = f"{known.get('model name', '')}, model {known.get('model', '?')}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{model or platform.processor()}, {usable_cpus().cpus} CPUs; load average at the end "
        f"{load}; Python {platform.python_version()}; {time.strftime('%Y-%m-%d', time.gmtime())}"
    )
