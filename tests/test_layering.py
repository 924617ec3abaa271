"""The layers of the design, checked on the source: who may import whom, and what nobody may do.

    server.api -> server.engine -> server.deltas -> server.ops        (each may use those after it)
    server     -> compressor.{artifact, identity, errors, codecs}     (the format)
                  and compressor.usable_cpus, usable_memory           (nothing else)
    compressor -> never server

Every check is a function from a parsed file to complaints, and is itself tested on a bad line.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compressor", "server", "benchmarks", "deploy", "tests")
MAX_LINES = 400

# Layer -> what it may import of the server; the top-level modules are open to all.
MAY_IMPORT = {
    "server.api": {"server.api", "server.engine"},
    "server.engine": {"server.engine", "server.deltas", "server.ops"},
    "server.deltas": {"server.deltas", "server.ops"},
    "server.ops": {"server.ops"},
}
WEB = {"fastapi", "starlette", "pydantic", "uvicorn"}
TENSOR = {"torch", "transformers", "safetensors", "numpy", "triton", "numba", "llvmlite"}
OPS_ONLY = {"torch", "numpy", "numba", "triton", "llvmlite", "filelock"}
FORMAT = (
    "compressor.artifact",
    "compressor.identity",
    "compressor.errors",
    "compressor.codecs",
)
OPEN = (*FORMAT, "compressor.usable_cpus", "compressor.usable_memory")
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}
MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATORS = {
    *("append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem"),
    *("clear", "remove", "discard", "appendleft"),
}


@dataclass(frozen=True)
class Source:
    """One parsed file under its dotted module name."""

    module: str
    tree: ast.Module
    n_lines: int


@cache
def parse(path: Path) -> Source:
    text = path.read_text()
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(module, ast.parse(text), len(text.splitlines()))


def from_text(module: str, text: str) -> Source:
    return Source(module, ast.parse(text), len(text.splitlines()))


def files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(source: Source) -> Iterator[str]:
    """Dotted names imported anywhere in the file, ``from x import y`` as ``x.y``."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.module}:{node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(module: str) -> str | None:
    return next((layer for layer in MAY_IMPORT if within(module, layer)), None)


# --- the checks ---------------------------------------------------------------------------------


def check_layers(source: Source) -> Iterator[str]:
    layer = layer_of(source.module)
    if layer is None:
        return
    for name in imports(source):
        other = layer_of(name)
        if other is not None and other not in MAY_IMPORT[layer]:
            yield f"{layer} must not import {name}"


def check_libraries(source: Source) -> Iterator[str]:
    layer = layer_of(source.module)
    for name in imports(source):
        top = name.partition(".")[0]
        if layer == "server.api" and top in TENSOR:
            yield f"server.api imports {name}: tensors stay in the engine"
        if layer in ("server.engine", "server.deltas", "server.ops") and top in WEB:
            yield f"{layer} imports {name}: HTTP stays in server.api"
        if within(source.module, "compressor") and top in WEB:
            yield f"the compressor imports {name}"
        if layer == "server.ops" and not (
            top in OPS_ONLY
            or top in sys.stdlib_module_names
            or within(name, "server.ops")
            or within(name, "compressor.codecs")
            or within(name, "compressor.usable_cpus")
        ):
            yield f"server.ops imports {name}: tensor libraries, compilers, codecs and CPUs only"


def check_packages(source: Source) -> Iterator[str]:
    for name in imports(source):
        if within(source.module, "compressor") and within(name, "server"):
            yield f"the compressor imports {name}"
        if (
            within(source.module, "server")
            and within(name, "compressor")
            and not any(within(name, allowed) for allowed in OPEN)
        ):
            yield f"the server imports {name}; of the compressor it may use {', '.join(OPEN)}"


def check_leaves(source: Source) -> Iterator[str]:
    allowed = {
        "compressor.errors": set[str](),
        "compressor.cgroups": set[str](),
        "compressor.usable_cpus": {"compressor.cgroups"},
        "compressor.usable_memory": {"compressor.cgroups"},
        "server.errors": set[str](),
        "server.settings": {"server.errors"},
    }
    if source.module not in allowed:
        return
    for name in imports(source):
        local = within(name, "server") or within(name, "compressor")
        if local and not any(within(name, leaf) for leaf in allowed[source.module]):
            yield f"{source.module} imports {name}: it stands alone"


def check_unsafe(source: Source) -> Iterator[str]:
    for name in imports(source):
        if name.partition(".")[0] in UNSAFE_MODULES:
            yield f"imports {name}: it can run code from a file"
        if tuple(name.split(".")) in UNSAFE_CALLS:
            yield f"imports {name}: it can run code from a file"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and (owner.id, node.func.attr) in UNSAFE_CALLS:
                yield f"line {node.lineno}: {owner.id}.{node.func.attr} can run code from a file"
        if (
            isinstance(node, ast.keyword)
            and node.arg in ("trust_remote_code", "allow_pickle")
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            yield f"line {node.value.lineno}: {node.arg} may only be False"


def is_mutable(value: ast.expr | None) -> bool:
    literal = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else None
        name = value.func.id if isinstance(value.func, ast.Name) else name
        return name in MUTABLE_CALLS
    return isinstance(value, literal)


def module_mutables(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign) and is_mutable(node.value):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and is_mutable(node.value):
            targets = [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def written_names(tree: ast.Module) -> Iterator[str]:
    """Names changed in place: ``x[...] = ``, ``del x[...]`` or ``x.append(...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            changes = isinstance(node.ctx, (ast.Store, ast.Del))
        elif isinstance(node, ast.Attribute):
            changes = node.attr in MUTATORS
        else:
            continue
        if changes and isinstance(node.value, ast.Name):
            yield node.value.id


def check_globals(source: Source) -> Iterator[str]:
    """Tables in capitals are constants; anything else mutable at module level is hidden state."""
    if not (within(source.module, "server") or within(source.module, "compressor")):
        return
    written = set(written_names(source.tree))
    for name in module_mutables(source.tree):
        if name != "__all__" and (not name.isupper() or name in written):
            yield f"module-level mutable state: {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"


def check_length(source: Source) -> Iterator[str]:
    if source.n_lines > MAX_LINES:
        yield f"{source.n_lines} lines; more than {MAX_LINES} wants to be two files"


CHECKS: tuple[Callable[[Source], Iterator[str]], ...] = (
    check_layers,
    check_libraries,
    check_packages,
    check_leaves,
    check_unsafe,
    check_globals,
    check_length,
)

# --- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source_keeps_the_rules(check: Callable[[Source], Iterator[str]]) -> None:
    complaints = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in files()
        for complaint in check(parse(path))
    ]
    assert complaints == []


@pytest.mark.parametrize(
    ("check", "module", "text"),
    [
        (check_layers, "server.api.app", "from server.ops.delta import f"),
        (check_layers, "server.deltas.registry", "from server.engine import loop"),
        (check_layers, "server.ops.delta", "import server.deltas.slots"),
        (check_libraries, "server.api.app", "import torch"),
        (check_libraries, "server.engine.loop", "from fastapi import FastAPI"),
        (check_libraries, "server.ops.delta", "from transformers import AutoModel"),
        (check_libraries, "compressor.cli", "import pydantic"),
        (check_packages, "server.engine.loop", "from compressor.pipeline import compress"),
        (check_packages, "server.engine.loop", "from compressor import pipeline"),
        (check_packages, "server.engine.loop", "from compressor.cgroups import cpu_quota"),
        (check_leaves, "compressor.usable_cpus", "from compressor.artifact import read_artifact"),
        (check_packages, "compressor.cli", "from server.errors import ServeError"),
        (check_leaves, "server.errors", "from server.settings import Settings"),
        (check_leaves, "server.settings", "from server.engine.types import ModelInfo"),
        (check_unsafe, "tests.x", "import dill"),
        (check_unsafe, "tests.x", "torch.load ('x')"),
        (check_unsafe, "tests.x", "from torch import load"),
        (check_unsafe, "tests.x", "yaml.load ('x')"),
        (check_unsafe, "tests.x", "f(trust_remote_code=flag)"),
        (check_unsafe, "tests.x", "np.load('x', allow_pickle=True)"),
        (check_globals, "server.engine.loop", "cache = {}"),
        (check_globals, "server.engine.loop", "CACHE: dict = {}\ndef f(): CACHE['a'] = 1"),
        (check_globals, "server.engine.loop", "CACHE = []\ndef f(): CACHE.append(1)"),
        (check_globals, "server.engine.loop", "x = 1\ndef f():\n    global x"),
        (check_length, "tests.x", "\n" * (MAX_LINES + 1)),
    ],
)
def test_check_finds_the_bad_line(
    check: Callable[[Source], Iterator[str]], module: str, text: str
) -> None:
    assert list(check(from_text(module, text)))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("server.api.app", "from server.engine.types import ModelInfo\nimport fastapi"),
        ("server.ops.delta", "import torch\nfrom compressor.codecs.term import Term"),
        ("server.deltas.store", "from compressor.artifact import read_artifact"),
        ("server.ops.cpu.features", "from compressor.usable_cpus import product_threads"),
        ("server.settings", "from server.errors import ConfigError\nGIB = 1 << 30"),
        ("server.engine.loop", "TABLE = {'a': 1}\n__all__ = ['x']"),
        ("tests.x", "yaml.safe_load('x')\nf(trust_remote_code=False)"),
    ],
)
def test_checks_accept_good_lines(module: str, text: str) -> None:
    source = from_text(module, text)
    assert [complaint for check in CHECKS for complaint in check(source)] == []


def test_http_layer_imports_without_torch() -> None:
    """Also through what it imports: the edge starts in a second and can be tested without torch."""
    modules = [parse(path).module for path in files() if within(parse(path).module, "server.api")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0, "server.api imports torch through another module"
