"""The two benchmark tasks, in the prompt formats their fine-tunes were trained on.

Data sets: banking77 and restaurant8k of PolyAI's task-specific-datasets (CC BY 4.0); not shipped.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTENT = "Classify the banking request.\nRequest: {}\nIntent:"
SLOTS = "Extract the booking slots as JSON.\nMessage: {}\nSlots:"


@dataclass(frozen=True, slots=True)
class Item:
    """One test item. The gold answer starts with a space, as in training."""

    prompt: str
    answer: str


def load_items(task: str, path: Path, n: int | None, seed: int = 0) -> list[Item]:
    """Read the test file of `task` and draw `n` items (all if None), the same for a seed."""
    items = TASKS[task](path)
    if n is None or n >= len(items):
        return items
    return random.Random(seed).sample(items, n)


def write_calibration(items: Sequence[Item], path: Path) -> Path:
    """Write prompts and answers as `compressor.measure.samples` reads them; return `path`."""
    lines = (json.dumps({"prompt": item.prompt, "completion": item.answer}) for item in items)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_intent(path: Path) -> list[Item]:
    """Read banking77's ``test.csv``: columns text, category."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Item(INTENT.format(row["text"]), " " + row["category"].replace("_", " "))
            for row in csv.DictReader(file)
        ]


def read_slots(path: Path) -> list[Item]:
    """Read restaurant8k's ``test.json``: spans of the text by slot name."""
    items = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        text = entry["userInput"]["text"]
        slots = {
            label["slot"]: _span(text, label["valueSpan"]) for label in entry.get("labels", [])
        }
        items.append(Item(SLOTS.format(text), " " + json.dumps(slots, sort_keys=True)))
    return items


def _span(text: str, span: dict[str, Any]) -> str:
    return text[span.get("startIndex", 0) : span.get("endIndex", len(text))]


def reference_paragraphs(n: int, seed: int = 0) -> list[str]:
    """Draw `n` paragraphs of prose from the Python reference, the same for a seed.

    Text that neither fine-tune was trained on, and that comes with every Python. Python's
    licence; not shipped. Another version of Python may word a few differently.
    """
    from pydoc_data.topics import topics

    paragraphs = (
        " ".join(p.split()) for topic in sorted(topics) for p in topics[topic].split("\n\n")
    )
    prose = [p for p in dict.fromkeys(paragraphs) if _is_prose(p)]
    return random.Random(seed).sample(prose, n)


def _is_prose(paragraph: str) -> bool:
    plain = len(re.findall(r"[A-Za-z ,.]", paragraph)) / max(1, len(paragraph))
    return len(paragraph) > 200 and plain > 0.95 and paragraph.endswith(".")


TASKS: dict[str, Callable[[Path], list[Item]]] = {"intent": read_intent, "slots": read_slots}
