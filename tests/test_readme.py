"""What the pages show exists: metrics, links, files, commands, code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", ".cache", "build", "dist", "node_modules"}
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not SKIPPED & set(path.relative_to(ROOT).parts)
)
# The pages that people read; results and notes have wide tables and long lines.
PROSE = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "compressor/README.md",
        "server/README.md",
        "server/engine/README.md",
        "benchmarks/README.md",
    )
]
SERVER = ROOT / "server" / "README.md"
MAX_LINES = {"README.md": 150, "benchmarks/RESULTS.md": 150}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
METRIC = re.compile(r"[`\"]((?:vllm:|impart_)[a-z0-9_]+)[`\"]")
SOURCE = re.compile(r"`((?:[\w-]+/)+[\w-]*(?:\.py|/))`")
ROOTS = ("", "server", "server/engine", "compressor", "benchmarks")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def make_targets(page: Path) -> set[str]:
    """What is run in blocks of commands, or named in code."""
    text = page.read_text()
    fenced = "\n".join(block for _, block in FENCE.findall(text))
    named = set(re.findall(r"`make ([a-z][a-z0-9-]*)", FENCE.sub("", text)))
    return named | set(re.findall(r"^make ([a-z][a-z0-9-]*)", fenced, re.MULTILINE))


def section(page: Path, title: str) -> str:
    text = page.read_text()
    start = text.index(f"\n## {title}\n")
    return text[start : text.index("\n## ", start + 1)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_metrics_table_names_every_metric_and_no_other() -> None:
    sources = (ROOT / "server" / "metrics").glob("*.py")
    kept = {name for path in sources for name in METRIC.findall(path.read_text())}
    shown = set(METRIC.findall(section(SERVER, "Metrics")))
    assert {n.removesuffix("_total") for n in shown} == {n.removesuffix("_total") for n in kept}


@pytest.mark.parametrize("name", MAX_LINES)
def test_page_has_at_most_its_lines(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= MAX_LINES[name]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_page_names_of_source_files_exist(page: Path) -> None:
    for name in SOURCE.findall(FENCE.sub("", page.read_text())):
        shown = "NAME" in name  # a file that a reader would add
        assert shown or any((ROOT / root / name).exists() for root in ROOTS), name


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_page_python_blocks_parse(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


def test_readme_shows_how_to_call_in_python() -> None:
    assert blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_modules_and_make_targets_in_commands_exist(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in make_targets(page):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in set(
        re.findall(r"python -m ((?:benchmarks|server|compressor|deploy)[\w.]*)", text)
    ):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_readme_names_the_two_commands() -> None:
    assert {"demo", "test"} <= make_targets(ROOT / "README.md")


def test_layout_tree_paths_exist() -> None:
    (tree,) = [b for b in blocks(ROOT / "README.md", "") if b.startswith("compressor/")]
    parent = ""
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            parent, names = names[0], ["", *names[1:]]
        for name in names:
            assert (ROOT / parent / name).exists(), name


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_page_lines_fit(page: Path) -> None:
    for line in page.read_text().splitlines():
        assert len(line) <= 110 or line.startswith("|"), line
