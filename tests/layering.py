"""The layers of the design, checked on the source: who may import whom, and what nobody may do.

    server:      process -> api -> metrics -> engine -> model -> deltas -> ops, engine -> text
                 (metrics and what is above it know the engine's types only)
                 process, api -> ledger -> tenants; the engine knows a tenant's principal only
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

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compressor", "server", "benchmarks", "deploy", "tests")
MAX_LINES = 400

# Layer -> what it may import of its own package.
SERVER = {
    "server.process": {
        "server.process",
        "server.api",
        "server.metrics",
        "server.engine.types",
        "server.engine.life_types",
        "server.tenants",
        "server.ledger",
        "server.fleet",
    },
    "server.api": {
        "server.api",
        "server.metrics",
        "server.engine.types",
        "server.engine.life_types",
        "server.tenants",
        "server.ledger",
        "server.fleet",
    },
    "server.fleet": {"server.fleet"},
    "server.ledger": {"server.ledger", "server.tenants"},
    "server.tenants": {"server.tenants"},
    "server.metrics": {"server.metrics", "server.engine.types"},
    "server.engine": {
        "server.engine",
        "server.fleet",
        "server.tenants.principal",
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
SERVER_LEAVES = {"server.errors", "server.setting_kinds", "server.settings"}  # open to all layers
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
        "server.setting_kinds": set[str](),
        "server.settings": {"server.errors", "server.setting_kinds"},
        "compressor.__main__": {"compressor.cli"},
    }
    | HELPERS
)
ON_TOP = {
    "server",
    "server.__main__",
    "server.check",
    "server.compile",
    "server.plan",
    "server.usage",
    "compressor",
}
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
