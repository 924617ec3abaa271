"""Which form of an operation a CPU gets, and that no instruction of a vendor stands elsewhere."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.ops.cpu import features
from server.ops.cpu.features import Form, Target, chosen, host_target, target_of
from tests.server.ops.cpu.kinds import kind

SOURCES = sorted(Path(features.__file__).parent.rglob("*.py"))
VENDORS = ("llvm.x86.", "llvm.aarch64.", "llvm.arm.", "llvm.ppc.")


def context(features: str) -> SimpleNamespace:
    codegen = SimpleNamespace(magic_tuple=lambda: ("x86_64-linux", "somewhat", features))
    codegen = type("Codegen", (), {"magic_tuple": staticmethod(codegen.magic_tuple)})()
    return SimpleNamespace(codegen=lambda: codegen)


def plain() -> str:
    return "plain"


def special() -> str:
    return "special"


FORMS = (Form(special, ("avx512f", "avx512bf16")), Form(plain))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("+avx512f,+avx512bf16", special),
        ("+avx512f,-avx512bf16", plain),
        ("+avx512bf16", plain),
        ("", plain),
    ],
)
def test_chosen_is_the_first_form_whose_needs_are_all_there(
    features: str, expected: object
) -> None:
    assert chosen(context(features), FORMS) is expected


def test_target_counts_only_the_features_that_are_there() -> None:
    target = target_of(context("+avx2,-avx512f,+fma"))
    assert target == Target("x86_64-linux", "somewhat", frozenset({"avx2", "fma"}))
    assert target.has(("avx2", "fma"))
    assert not target.has(("avx512f",))


@pytest.mark.parametrize(
    ("present", "text"),
    [
        ({"avx2", "fma", "sse4.2"}, "znver3 (AVX2, no bfloat16 units)"),
        ({"avx512f", "avx2", "avx512bf16"}, "znver3 (AVX-512, bfloat16 units)"),
        ({"neon", "bf16"}, "znver3 (NEON, bfloat16 units)"),
        (set(), "znver3 (no vectors, no bfloat16 units)"),
    ],
)
def test_target_is_told_in_words_people_know(
    present: set[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert str(Target("t", "znver3", frozenset(present))) == text


def test_host_target_follows_numbas_variables() -> None:
    code = "from server.ops.cpu.features import host_target; print(host_target())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kind("haswell").environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "haswell (AVX2, no bfloat16 units)"


def test_host_target_has_a_name() -> None:
    assert host_target().name


# --- where instructions of a vendor stand -------------------------------------------------------


def unguarded(tree: ast.Module) -> Iterator[str]:
    """Names of vendors' instructions outside functions that only guarded forms write."""
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Form":
            write, *needs = node.args
            if needs and isinstance(write, ast.Name) and ast.unparse(needs[0]) != "()":
                guarded.add(write.id)
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in guarded
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield from (node.value for vendor in VENDORS if vendor in node.value)


def forms(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Each table of forms: its name and its last form."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            calls = [one for one in node.value.elts if isinstance(one, ast.Call)]
            if calls and all(getattr(one.func, "id", "") == "Form" for one in calls):
                yield ast.unparse(node.targets[0]), calls[-1]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_vendors_instructions_stand_in_guarded_forms_with_a_plain_one_beside_them(
    source: Path,
) -> None:
    tree = ast.parse(source.read_text())
    assert list(unguarded(tree)) == []
    for name, last in forms(tree):
        assert isinstance(last, ast.Call)
        assert len(last.args) == 1, f"{name} has no form for every CPU"


def test_unguarded_finds_what_it_looks_for() -> None:
    text = "def f(): return 'llvm.x86.avx512.x'\nA = (Form(f, ('avx512f',)), Form(g))"
    assert list(unguarded(ast.parse(text))) == []
    assert list(unguarded(ast.parse(text.replace(", ('avx512f',)", "")))) == ["llvm.x86.avx512.x"]


def test_only_one_module_asks_what_the_cpu_has() -> None:
    asking = ("magic_tuple", "get_host_cpu", "cpu_target")
    found = {path.name for path in SOURCES for word in asking if word in path.read_text()}
    assert found == {"features.py"}
