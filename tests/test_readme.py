"""What the README shows must exist: paths, commands, valid code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


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
