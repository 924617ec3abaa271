"""What came of one case of the matrix, cell by cell."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from compressor.errors import ImpartError
from server.errors import ConfigError, EngineError, ServeError

# exact: equal to transformers. refused: with one sentence. wrong, crash: a fault of ours.
# unreached: something before it was refused or failed. missing: no model was built.
State = Literal["exact", "refused", "wrong", "crash", "unreached", "missing"]
FAULTS: tuple[State, ...] = ("wrong", "crash")
CELLS = ("compress", "reconstruct", "base", "variant")
LONGEST_SENTENCE = 600


@dataclass(frozen=True)
class Outcome:
    """One cell; `text` is the sentence of a refusal or what is wrong."""

    state: State
    text: str = ""


UNREACHED = Outcome("unreached")
EXACT = Outcome("exact")


@dataclass(frozen=True)
class Row:
    """One case; `notes` say what transformers itself does not agree on."""

    name: str
    compress: Outcome = UNREACHED
    reconstruct: Outcome = UNREACHED
    base: Outcome = UNREACHED
    variant: Outcome = UNREACHED
    notes: tuple[str, ...] = ()

    def cells(self) -> dict[str, Outcome]:
        return {cell: getattr(self, cell) for cell in CELLS}

    def faults(self) -> dict[str, Outcome]:
        """The cells that are neither exact nor refused."""
        return {cell: found for cell, found in self.cells().items() if found.state in FAULTS}

    def all_cells(self, outcome: Outcome) -> Self:
        return replace(self, **dict.fromkeys(CELLS, outcome))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        cells = {cell: Outcome(**data[cell]) for cell in CELLS}
        return cls(data["name"], notes=tuple(data["notes"]), **cells)


def outcome_of(error: Exception) -> Outcome:
    """A refusal is an error of ours that is raised on purpose and says so in one sentence."""
    is_ours = isinstance(error, ImpartError | ConfigError | ServeError)
    if not is_ours or isinstance(error, EngineError):
        return Outcome("crash", described(error))
    text = str(error)
    if "finds out why in the log" in text:  # an exception that nobody foresaw
        return Outcome("crash", text)
    if "\n" in text or not 0 < len(text) <= LONGEST_SENTENCE:
        return Outcome("crash", f"the refusal is not one sentence: {text[:LONGEST_SENTENCE]}")
    return Outcome("refused", text)


def described(error: BaseException) -> str:
    """The error and the last place in our code or transformers' that it came from."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(
            f"{re.sub('.*(site-packages|impart|wt/[^/]+)/', '', code.co_filename)}:"
            f"{trace.tb_lineno} {code.co_name}"
        )
        trace = trace.tb_next
    where = " < ".join(reversed(places[-4:]))
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({where})"
