"""What the README shows must exist: settings with their defaults, paths, commands, valid code."""

from __future__ import annotations

import ast
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def section(title: str) -> str:
    start = README.index(f"# {title}\n")
    end = README.find("\n## ", start)
    return README[start : end if end > 0 else None]


def settings_table() -> dict[str, str]:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section("Settings"), re.MULTILINE)
    table = {}
    for names, defaults in rows:
        keys = re.findall(r"`(\w+)`", names)
        values = defaults.split(", ") if len(keys) > 1 else [defaults]
        table |= dict(zip(keys, values, strict=True))
    return table


def test_settings_table_names_every_setting() -> None:
    assert set(settings_table()) == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_settings_table_default_is_the_real_one(field: object) -> None:
    shown = settings_table()[field.name]  # type: ignore[attr-defined]
    default = field.default  # type: ignore[attr-defined]
    if default is MISSING or default is None:
        assert not re.search(r"\d", shown), "a number where the setting has no default of its own"
        return
    if isinstance(default, bool):
        assert shown == ("on" if default else "off")
    elif match := re.fullmatch(r"(\d+) ([GM])iB", shown):
        assert int(match[1]) << (30 if match[2] == "G" else 20) == default
    elif isinstance(default, bool):
        assert shown == ("on" if default else "off")
    elif isinstance(default, int | float):
        assert float(shown) == default
    else:
        assert shown == default


def test_layout_tree_paths_exist() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("compressor/")]
    parent = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            parent = name
        assert (ROOT / (parent + name if line.startswith(" ") else name)).exists(), name


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_python_blocks_parse() -> None:
    assert blocks("python")
    for block in blocks("python"):
        ast.parse(block)


def test_modules_and_make_targets_in_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "test", "check", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in set(re.findall(r"python -m ([\w.]+)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_lines_fit_the_page() -> None:
    for line in README.splitlines():
        assert len(line) <= 110 or line.startswith("|"), line
