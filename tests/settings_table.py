"""The documentation's table of settings, made from what Settings declares.

``python -m tests.settings_table`` (``make settings-table``) writes it into the page that has the
heading "Settings"; tests/test_readme.py complains where the page says something else.
"""

from __future__ import annotations

import re
from pathlib import Path

from server.cli import declarations

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("server/README.md", "README.md")
HEADING = re.compile(r"^#+ Settings$", re.MULTILINE)
TABLE = re.compile(r"^\| setting .*?(?=^(?!\|)|\Z)", re.MULTILINE | re.DOTALL)


def page() -> Path:
    """The page that has the settings' heading."""
    pages = (ROOT / name for name in PAGES)
    return next(path for path in pages if path.exists() and HEADING.search(path.read_text()))


def written_table(text: str) -> str:
    """The first table of settings below the heading in a page's text."""
    heading = HEADING.search(text)
    assert heading, "the page has no heading Settings"
    table = TABLE.search(text, heading.end())
    assert table, "the page has no table of settings"
    return table[0]


def table() -> str:
    """The table as it should be."""
    lines = ["| setting | values | default | what |", "|---|---|---|---|"]
    for declared in declarations():
        default = "required" if declared.is_required else declared.default
        cells = (f"`{declared.name}`", declared.kind.replace("|", ", "), default, declared.meaning)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = page()
    text = path.read_text()
    path.write_text(text.replace(written_table(text), table()))
