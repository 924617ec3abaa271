"""The layers of the design, checked on the source: who may import whom, and what nobody may do.

    server:      process -> api -> metrics -> engine -> model -> deltas -> ops, engine -> text
                 (metrics and what is above it know the engine's types only)
    compressor:  codecs < encoders < checkpoint < artifact < plan < measure < auto < compress
                 < export < peft < merge < report < cli      (each may use those before it)
    server     -> the artifact's format, and what `OPEN` names; nothing else of compressor
    compressor -> never server

An import inside a function, or for types only, counts as any other. Every check is a function
from a parsed file (circles: from all of them) to complaints, and is itself tested on a bad line.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compressor", "server", "benchmarks", "deploy", "tests")
MAX_LINES = 400

# Layer -> what it may import of its own package.
SERVER = {
    "server.process": {"server.process", "server.api", "server.metrics", "server.engine.types"},
    "server.api": {"server.api", "server.metrics", "server.engine.types"},
    "server.metrics": {"server.metrics", "server.engine.types"},
    "server.engine": {
        "server.engine",
        "server.text",
        "server.model",
        "server.deltas",
        "server.ops",
    },
    "server.text": {"server.text"},
    "server.model": {"server.model", "server.deltas", "server.ops"},
    "server.deltas": {"server.deltas", "server.ops"},
    "server.ops": {"server.ops"},
    "server.cli": set[str](),
}
SERVER_LEAVES = {"server.errors", "server.settings"}  # open to all layers
COUNTS_BYTES = ("server.api.body_bounds", "numpy")  # arrays of characters are no tensors
ORDER = (
    "codecs", "encoders", "checkpoint", "artifact", "plan", "measure", "auto", "compress",
    "export", "peft", "merge", "report", "cli",
)  # fmt: skip
HELPERS = {
    "compressor.errors": set[str](),
    "compressor.atomic": {"compressor.errors"},
    "compressor.printable": set[str](),
    "compressor.progress": set[str](),
    "compressor.readable": set[str](),
    "compressor.safetensors_header": set[str](),
    "compressor.cgroups": set[str](),
    "compressor.usable_cpus": {"compressor.cgroups"},
    "compressor.usable_memory": {"compressor.cgroups"},
}
COMPRESSOR = {
    f"compressor.{folder}": {f"compressor.{below}" for below in ORDER[: index + 1]}
    for index, folder in enumerate(ORDER)
}
MAY_IMPORT = (
    {layer: below | SERVER_LEAVES for layer, below in SERVER.items()}
    | {
        layer: below | HELPERS.keys() | {"compressor.__version__"}
        for layer, below in COMPRESSOR.items()
    }
    | {
        "server.errors": set[str](),
        "server.settings": {"server.errors"},
        "compressor.__main__": {"compressor.cli"},
    }
    | HELPERS
)
ON_TOP = {"server", "server.__main__", "server.check", "server.compile", "compressor"}
BELOW_HTTP = {f"server.{name}" for name in ("metrics", "engine", "text", "model", "deltas", "ops")}
ABOVE_TENSORS = {"server.process", "server.api", "server.metrics"}
WEB = {"fastapi", "starlette", "pydantic", "uvicorn"}
TENSOR = {"torch", "transformers", "safetensors", "numpy", "triton", "numba", "llvmlite"}
OPS_ONLY = {"torch", "numpy", "numba", "triton", "llvmlite", "filelock"}
FORMAT = ("compressor.artifact", "compressor.codecs", "compressor.errors", "compressor.__version__")
OPEN_HELPERS = tuple(f"compressor.{name}" for name in ("usable_cpus", "usable_memory", "readable"))
OPEN_FILES = ("folder", "headers", "hub", "dense_model", "quantised.index", "quantised.settings")
OPEN = (*FORMAT, *OPEN_HELPERS, *(f"compressor.checkpoint.{name}" for name in OPEN_FILES))
IMPORTING_PACKAGES = {"compressor.codecs"}  # others' `__init__` holds what it is and no more
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}
MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATORS = {
    "append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem",
    "clear", "remove", "discard", "appendleft",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One parsed file under its dotted module name."""

    module: str
    tree: ast.Module
    n_lines: int
    is_package: bool


@cache
def parse(path: Path) -> Source:
    return from_text(".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text())


def from_text(module: str, text: str) -> Source:
    name = module.removesuffix(".__init__")
    return Source(name, ast.parse(text), len(text.splitlines()), name != module)


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
    package = source.module.partition(".")[0]
    if package not in ("server", "compressor") or source.module in ON_TOP:
        return
    layer = layer_of(source.module)
    if layer is None:
        yield f"{source.module} has no place in the order of {package}"
        return
    for name in imports(source):
        allowed = any(within(name, other) for other in MAY_IMPORT[layer])
        if within(name, package) and not allowed:
            yield f"{layer} must not import {name}"


def check_init(source: Source) -> Iterator[str]:
    ours = within(source.module, "server") or within(source.module, "compressor")
    if ours and source.is_package and source.module not in IMPORTING_PACKAGES:
        for node in source.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield f"line {node.lineno}: importing a package must load nothing else"


def check_libraries(source: Source) -> Iterator[str]:
    layer = layer_of(source.module)
    for name in imports(source):
        top = name.partition(".")[0]
        if layer in ABOVE_TENSORS and top in TENSOR and (source.module, top) != COUNTS_BYTES:
            yield f"{layer} imports {name}: tensors stay in the engine"
        if layer == "server.text" and top == "torch":
            yield f"{layer} imports {name}: text workers start without it"
        if layer in BELOW_HTTP and top in WEB:
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


def find_circle(sources: Iterable[Source]) -> list[str]:
    """Modules that import each other in a circle, in order, one twice; none: empty."""
    known = {source.module: source for source in sources}
    graph = {
        module: {owner for name in imports(source) if (owner := owner_of(name, known)) != module}
        for module, source in known.items()
    }
    try:
        TopologicalSorter({module: others - {""} for module, others in graph.items()}).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def owner_of(name: str, modules: Container[str]) -> str:
    """The module that an imported name is, or is in; "" if it is none of `modules`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


CHECKS: tuple[Callable[[Source], Iterator[str]], ...] = (
    check_layers,
    check_init,
    check_libraries,
    check_packages,
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


def test_no_modules_import_each_other() -> None:
    sources = map(parse, files())
    ours = [s for s in sources if s.module.partition(".")[0] in ("compressor", "server")]
    assert find_circle(ours) == []


@pytest.mark.parametrize(
    ("texts", "length"),
    [
        (["from server import b", "import server.c", "from server.a import x"], 4),
        (["from server import b", "def f():\n    from server.a import x", ""], 3),
        (["from server import b, c", "import server.c", "import torch"], 0),
    ],
)
def test_circle_is_found(texts: list[str], length: int) -> None:
    sources = [from_text(f"server.{name}", text) for name, text in zip("abc", texts, strict=True)]
    assert len(find_circle(sources)) == length


@pytest.mark.parametrize(
    ("check", "module", "text"),
    [
        (check_layers, "server.api.app", "from server.ops.blockdiag import f"),
        (check_layers, "server.api.app", "from server.process.run import run"),
        (check_layers, "server.metrics.series", "from server.api.app import create_app"),
        (check_layers, "server.model.base", "def f():\n    import server.engine.request"),
        (check_layers, "server.deltas.registry", "from server.model import base"),
        (check_layers, "server.ops.linear", "import server.deltas.slots"),
        (check_layers, "server.engine.core", "from server.cli import command"),
        (check_layers, "server.errors", "from server.settings import Settings"),
        (check_layers, "server.settings", "from server.engine.types import ModelInfo"),
        (check_layers, "server.new.file", "import torch"),
        (check_layers, "compressor.codecs.rows", "from compressor.encoders.svd import factors"),
        (check_layers, "compressor.export.mergekit", "from compressor.peft import adapter"),
        (check_layers, "compressor.atomic", "from compressor.progress import silent"),
        (check_layers, "compressor.usable_cpus", "from compressor.artifact import reader"),
        (check_layers, "compressor.new", "import torch"),
        (check_init, "server.ops.__init__", "import torch"),
        (check_libraries, "server.api.app", "import torch"),
        (check_libraries, "server.text.vocabulary", "import torch"),
        (check_layers, "server.text.service", "from server.engine.types import ModelInfo"),
        (check_libraries, "server.model.base", "from fastapi import FastAPI"),
        (check_libraries, "server.ops.linear", "from transformers import AutoModel"),
        (check_libraries, "compressor.cli.app", "import pydantic"),
        (check_packages, "server.engine.core", "from compressor.encoders.svd import spectrum"),
        (check_packages, "server.engine.core", "from compressor.checkpoint import files"),
        (check_packages, "server.engine.core", "from compressor.cgroups import cpu_quota"),
        (check_packages, "compressor.cli.app", "from server.errors import ServeError"),
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
        ("server.ops.linear", "import torch\nfrom compressor.codecs.term import Term"),
        ("server.deltas.loader", "from compressor.artifact.reader import read_artifact"),
        ("server.ops.cpu.features", "from compressor.usable_cpus import product_threads"),
        ("server.settings", "from server.errors import ConfigError\nGIB = 1 << 30"),
        ("server.engine.loop", "TABLE = {'a': 1}\n__all__ = ['x']"),
        ("compressor.merge.merge", "from compressor.peft.adapter import Adapter"),
        ("compressor.cli.__init__", "def main():\n    from compressor.cli.app import main"),
        ("tests.x", "yaml.safe_load('x')\nf(trust_remote_code=False)"),
    ],
)
def test_checks_accept_good_lines(module: str, text: str) -> None:
    source = from_text(module, text)
    assert [complaint for check in CHECKS for complaint in check(source)] == []
