"""What is measured: systems, loads, mixes of variants, and the order of all of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.load import Workload
from benchmarks.peers.errors import PeersError

DEFAULT_DIR = Path(".cache/peers")  # environments and variants
BASE = "base"  # what every system calls the base model
ZIPF_EXPONENT = 1.5
MIXES = {"uniform": "uniform", "zipf": f"zipf:{ZIPF_EXPONENT}"}


@dataclass(frozen=True, slots=True)
class Load:
    """Prompt and output tokens of every request."""

    prompt_tokens: int
    max_tokens: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``64x64``. Raises PeersError."""
        prompt, _, output = text.partition("x")
        if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
            raise PeersError(f"load {text!r} is not PROMPTxOUTPUT in tokens; write 64x64")
        return cls(int(prompt), int(output))

    def __str__(self) -> str:
        return f"{self.prompt_tokens}x{self.max_tokens}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be: a system serving `variants` variants (0: the base alone) under a load.

    mix  how requests are spread over the variants, a key of `MIXES`; empty for the base alone
    """

    system: str
    variants: int
    load: Load
    mix: str

    @property
    def key(self) -> tuple[str, int, str, str]:
        """Identifies the row."""
        return self.system, self.variants, str(self.load), self.mix

    @property
    def models(self) -> list[str]:
        """The names that requests ask for."""
        return variant_names(self.variants) or [BASE]

    def workload(self, id_range: tuple[int, int], *, warmup: bool = False) -> Workload:
        """The requests: the same for every system, others (also the prompts) for the warm-up."""
        text = f"{self.load} {self.mix} {self.variants} {warmup}"
        return Workload(
            models=self.models,
            assign=MIXES[self.mix] if self.mix else "uniform",
            prompt_tokens=self.load.prompt_tokens,
            id_range=id_range,
            seed=zlib.crc32(text.encode()),
        )


def variant_names(count: int) -> list[str]:
    """Names of `count` variants, the same in every system: ``v000``, ``v001``, ..."""
    return [f"v{index:03}" for index in range(count)]


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that one running server answers, one after the other."""

    system: str
    variants: int
    cells: tuple[Cell, ...]


def groups_of(
    systems: Sequence[str], counts: Sequence[int], loads: Sequence[Load], mixes: Sequence[str]
) -> Iterator[Group]:
    """All groups, the base alone first, then few variants before many.

    A system that is unknown or cannot serve the base alone is the caller's to leave out.
    """
    for mix in mixes:
        if mix not in MIXES:
            raise PeersError(f"mix {mix!r} is unknown; known: {', '.join(MIXES)}")
    for count in (0, *sorted(set(counts) - {0})):
        for system in systems:
            cells = (
                Cell(system, count, load, mix)
                for load in loads
                for mix in (mixes if count else [""])
            )
            yield Group(system, count, tuple(cells))
