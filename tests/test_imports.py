"""What importing the server loads, also through what it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The format, and what tells how much of the machine may be used.
COMPRESSOR = (
    "compressor.artifact", "compressor.codecs", "compressor.errors",
    "compressor.safetensors_header",
    "compressor.usable_cpus", "compressor.usable_memory", "compressor.cgroups",
    "compressor.readable", "compressor.atomic", "compressor.checkpoint.quantised",
)  # fmt: skip
# The base is read by what reads it when a delta is made, so that both see the same numbers.
FROM_CHECKPOINTS = {
    "compressor.checkpoint",
    "compressor.checkpoint.companions",
    "compressor.checkpoint.dense_model",
    "compressor.checkpoint.files",
    "compressor.checkpoint.folder",
    "compressor.checkpoint.gguf",
    "compressor.checkpoint.headers",
    "compressor.checkpoint.hub",
    "compressor.checkpoint.layout",
    "compressor.checkpoint.model_class",
    "compressor.checkpoint.parameter",
    "compressor.checkpoint.stored_form",
}


def modules_of(folder: str) -> list[str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return [name.removesuffix(".__init__") for name in names]


def loaded_by(*modules: str) -> set[str]:
    """All modules that are there after these were imported, in a process of its own."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def of_the_compressor(loaded: set[str]) -> set[str]:
    return {name for name in loaded if name.partition(".")[0] == "compressor"} - {"compressor"}


def strangers(loaded: set[str]) -> list[str]:
    """Modules of the compressor that the server has no use for."""
    known = (*COMPRESSOR, *(f"{name}." for name in COMPRESSOR))
    return sorted(
        name
        for name in of_the_compressor(loaded) - FROM_CHECKPOINTS
        if name not in known and not name.startswith(known[len(COMPRESSOR) :])
    )


def test_http_layer_imports_without_torch() -> None:
    """The edge starts in a second and can be tested without torch."""
    loaded = loaded_by(*modules_of("server/api"))
    assert "server.api.app" in loaded
    assert "torch" not in loaded, "server.api imports torch through another module"
    assert "sqlalchemy" not in loaded, "it is for who has a ledger"


def test_what_looks_at_mistakes_imports_nothing_heavy() -> None:
    """`server.__main__` and all it needs up to the engine; tests/server/test_main.py runs it."""
    heavy = {"torch", "numpy", "transformers", "fastapi", "uvicorn", "huggingface_hub"}
    heavy |= {"sqlalchemy", "alembic"}
    loaded = loaded_by("server.__main__")
    assert "server.process.inputs" in loaded
    assert not heavy & loaded


def test_server_loads_the_format_and_nothing_else_of_the_compressor() -> None:
    """No encoder, no plan, nothing that only compressing needs."""
    folders = ("api", "process", "metrics", "engine", "model", "deltas")
    modules = (name for folder in folders for name in modules_of(f"server/{folder}"))
    loaded = loaded_by("server.__main__", *modules)
    assert "compressor.artifact.reader" in loaded
    assert strangers(loaded) == []


def test_encoder_would_be_seen() -> None:
    assert "compressor.encoders.svd" in strangers(loaded_by("compressor.encoders.svd"))
