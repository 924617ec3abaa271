"""One word, one meaning: a public name stands for one thing in both packages, and no splat of a
literal saves lines.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compressor", "server")
FOLDERS = (*PACKAGES, "benchmarks", "deploy", "tests")

# Public names of several modules, each with the reason.
SHARED_NAMES = {
    "add_rms_norm": "one operation: torch and Triton",
    "impart_add_": "one operation: torch and Triton",
    "lowrank_add_": "one operation: torch and Triton",
    "packed_lowrank_add_": "one operation: torch and Triton",
    "rms_norm": "one operation: torch and Triton",
    "compress": "the command, and what it calls",
    "import_adapter": "the command, and what it calls",
    "merge": "the command, and what it calls",
    "reconstruct": "the command, and what it calls",
    "main": "where a program begins",
    "parse_header": "of a safetensors file: its entries, and then where their bytes are",
}


def parse(folder: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def public_names(tree: ast.Module) -> Iterator[str]:
    """Classes and functions of a module that others may import."""
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, definitions) and not node.name.startswith("_"):
            yield node.name


def shared(modules: Iterable[tuple[str, ast.Module]]) -> dict[str, list[str]]:
    """Public names that several modules define, with those modules."""
    found: dict[str, list[str]] = {}
    for module, tree in modules:
        for name in set(public_names(tree)):
            found.setdefault(name, []).append(module)
    return {name: where for name, where in found.items() if len(where) > 1}


def splats(tree: ast.Module) -> Iterator[int]:
    """Lines of ``*(a, b, c)``: what it holds can be written where it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List | ast.Set):
            yield node.lineno


def test_public_name_stands_for_one_thing() -> None:
    found = shared(pair for package in PACKAGES for pair in parse(package))
    unknown = {name: where for name, where in found.items() if name not in SHARED_NAMES}
    assert unknown == {}, "rename all but one, or say in SHARED_NAMES why they are one thing"
    assert sorted(SHARED_NAMES.keys() - found.keys()) == [], "these are no longer shared"


def test_no_splat_of_a_literal() -> None:
    found = [
        f"{module}:{line}"
        for folder in FOLDERS
        for module, tree in parse(folder)
        for line in splats(tree)
    ]
    assert found == []


def test_shared_names_of_two_modules_are_found() -> None:
    one = ast.parse("class Stored: ...\ndef _own(): ...\ndef run(): ...")
    two = ast.parse("class Stored: ...\ndef _own(): ...\ndef walk(): ...")
    assert shared([("one.py", one), ("two.py", two)]) == {"Stored": ["one.py", "two.py"]}


@pytest.mark.parametrize("text", ["f(*(a, b))", "x = [*[1, 2], 3]", "x = {\n*{1}}"])
def test_splat_of_a_literal_is_found(text: str) -> None:
    assert list(splats(ast.parse(text)))


@pytest.mark.parametrize("text", ["f(*rest)", "x = [*(i for i in y)]", "x = (*y, 1)"])
def test_other_splats_are_not(text: str) -> None:
    assert list(splats(ast.parse(text))) == []
