"""The page that says which models are compressed and served, written from a run of the matrix.

``make models-table`` runs everything and writes it. ``python -m tests.models.table RUN [OLDER
...]`` writes it from files of earlier runs; what only an older one has is marked.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path

import transformers

from tests.models.cases import all_cases
from tests.models.outcome import CELLS, Outcome, Row
from tests.models.run import read_rows, run_apart

PAGE = Path(__file__).resolve().parents[2] / "server" / "MODELS.md"
SIGNS = {"exact": "=", "unreached": "", "missing": ""}
HEADS = ("compress", "reconstruct", "serve base", "serve variant")
# What makes one sentence of a refusal differ from another model's: names of tensors and classes.
OWN = re.compile(
    r"(\b[\w.]+\.\d+\.[\w.\[\]]+|\[[\d, ]+\]|\b[A-Z]\w+(LM|LMHead\w+|Generation)\b|\d+)"
)
FOLDER = re.compile(r"/\S*/(?=config\.json|base:)")  # of the run, which is gone
LONGEST_REASON = 300
OLDER = "A star: found by an older state of the code than other rows, and not tried again since.\n"

INTRODUCTION = """# Models

Every causal language model class of transformers {version}, in a tiny random form, and some of the
ways through each definition (`tests/models/`). The table is written by `make models-table`, from a
run in which each model and two fine-tunes of it are compressed, verified, reconstructed, and served
in float32, alone and mixed in one batch, with prompts longer than every window and chunk.

- **=** is exact. A reconstructed checkpoint is base plus decoded terms, has the fine-tune's own
  vectors, and transformers loads it without a missing weight. A served model gives the tokens of
  transformers' `generate` on that checkpoint, with log probabilities within {tolerance:g}.
- **A number** is a refusal, in the sentence with that number below: when compressing, when the
  server starts, or when a variant is first asked for. Nothing is answered then.
- **An empty cell** was not reached: what comes before it is refused.
{faults}
The promise is: exact, or refused. It is made for these classes as they are, not for each checkpoint
in the world; `impart-serve` refuses classes that it does not know by what they do, not by name.
"""
NO_FAULTS = "- There is no other kind of cell: a wrong answer or a crash fails the test.\n"
FAULTS = """- **WRONG** or **CRASH** is a fault. With a star it may be mended since; those known
  to last are in `tests/models/known.py`.
"""


def page(rows: Iterable[Row], older: Container[str] = ()) -> str:
    """The whole page; `older` names models whose row was found by an older state of the code."""
    from tests.models.truth import TOLERANCE

    rows = list(rows)
    reasons = Reasons()
    lines = [f"| model | {' | '.join(HEADS)} |", f"|---|{'---|' * len(HEADS)}"]
    for row in rows:
        if row.compress.state != "missing":
            cells = (reasons.sign(row.name, found) for found in row.cells().values())
            mark = r" \*" if row.name in older else ""
            lines.append(f"| {row.name}{mark} | {' | '.join(cells)} |")
    faults = FAULTS if any(row.faults() for row in rows) else NO_FAULTS
    version = transformers.__version__
    parts = [
        INTRODUCTION.format(version=version, tolerance=TOLERANCE, faults=faults),
        "## Table\n",
        *([OLDER] if older else []),
        counts(rows),
        "\n".join(lines) + "\n",
        "## Why refused\n",
        "Names and shapes are those of the first model with that sentence.\n",
        reasons.listed(),
        *_not_tried(rows),
    ]
    return "\n".join(parts)


class Reasons:
    """Sentences of refusals, numbered as they come; those that say the same share a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._lines: list[str] = []

    def sign(self, name: str, outcome: Outcome) -> str:
        """What a cell shows."""
        if outcome.state in SIGNS:
            return SIGNS[outcome.state]
        if outcome.state != "refused":
            return outcome.state.upper()
        kind = OWN.sub("...", outcome.text)
        if kind not in self._numbers:
            self._numbers[kind] = len(self._numbers) + 1
            text = FOLDER.sub("", outcome.text).replace("|", "\\|").replace("`v0`", "the variant")
            shown = text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ..."
            self._lines.append(f"{len(self._numbers)}. {shown}")
        return str(self._numbers[kind])

    def listed(self) -> str:
        return "\n".join(self._lines) + "\n"


def counts(rows: Iterable[Row]) -> str:
    """How many of the models that were tried are exact, cell by cell."""
    tried = [row for row in rows if row.compress.state != "missing"]
    sums = Counter((cell, found.state) for row in tried for cell, found in row.cells().items())
    said = [
        f"{head} {sums[cell, 'exact']} exact, {sums[cell, 'refused']} refused"
        + (f", {bad} WRONG or CRASH" if (bad := sums[cell, "wrong"] + sums[cell, "crash"]) else "")
        for head, cell in zip(HEADS, CELLS, strict=True)
    ]
    return f"Of {len(tried)} models: {'; '.join(said)}.\n"


def _not_tried(rows: Iterable[Row]) -> list[str]:
    missing = [row for row in rows if row.compress.state == "missing"]
    if not missing:
        return []
    lines = [f"- {row.name}: {row.compress.text}" for row in missing]
    return ["## Not tried\n", "No tiny model could be made of these:\n", "\n".join(lines) + "\n"]


def main() -> None:
    newest, *before = [read_rows(Path(name)) for name in sys.argv[1:]] or [
        [*run_apart(all_cases())]
    ]
    found = {row.name: row for rows in (*reversed(before), newest) for row in rows}
    older = found.keys() - {row.name for row in newest}
    PAGE.write_text(page([found[name] for name in all_cases() if name in found], older))


if __name__ == "__main__":
    main()
