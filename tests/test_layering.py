"""The layers hold, and the rules that check them find what breaks them: see `tests.layering`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.layering import (
    CHECKS,
    MAX_LINES,
    ROOT,
    Source,
    check_globals,
    check_init,
    check_layers,
    check_length,
    check_libraries,
    check_packages,
    check_unsafe,
    files,
    find_circle,
    from_text,
    parse,
)


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
