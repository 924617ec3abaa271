"""The report page: complete, self-contained, escaped, its numbers those of the evaluation."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from compressor.artifact.reader import read_artifact
from compressor.cli.app import app
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.report.data import Report, log_spaced, make_report
from compressor.report.html import render
from tests.compressor.artifacts import edit_config
from tests.tiny import CORPUS

SCRIPT = "<script>alert(1)</script>"
HOSTILE = f'{SCRIPT}"><img src=x onerror=y> & $\\frac{{\x1b[31m'


class Page(HTMLParser):
    """Tags, attributes, visible text and table cells; fails on what is not closed properly."""

    VOID = frozenset({"meta", "path", "use", "rect", "img", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def deltas(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    folder = tmp_path_factory.mktemp("report")
    for name, ratio in (("eight", 8), ("sixteen", 16)):
        options = Options(codec="blockdiag", ratio=ratio)
        compress(tiny_llama, tiny_llama_ft, folder / name, options)
    return [folder / "eight", folder / "sixteen"]


def impart(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def page(tiny_llama: Path, tiny_llama_ft: Path, deltas: list[Path]) -> str:
    data = deltas[0].parent / "texts.txt"
    data.write_text("\n".join(CORPUS))
    out = deltas[0].parent / "report.html"
    done = impart("report", tiny_llama, tiny_llama_ft, *deltas, out, "--data", data)
    assert (done.exit_code, done.stderr) == (0, "")
    return out.read_text("utf-8")


def test_page_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert len(page) < 1_000_000


def test_page_has_every_plot_and_table(page: str, deltas: list[Path]) -> None:
    parsed = Page(page)
    text = " ".join(parsed.text)
    n_types = 9  # seven projections, embedding, lm_head
    assert parsed.tags.count("svg") == 3 + n_types
    for title in ("Quality against size", "KL by layer", "Bytes", "Singular values"):
        assert title in text
    for delta in deltas:
        artifact = read_artifact(delta)
        assert artifact.digest in text
        assert delta.name in text
        assert f"{artifact.n_bytes:,}" in text
    for layer in ("model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"):
        assert layer in text
    assert "#010101" not in page  # every placeholder colour has become a variable
    assert "#0300" not in page
    assert "mathdefault" not in page
    ids = [value for name, value in parsed.attributes if name == "id" and value.startswith("p")]
    assert len(ids) == len(set(ids))


def test_page_shows_the_numbers_of_the_evaluation(
    page: str, tiny_llama: Path, tiny_llama_ft: Path, deltas: list[Path]
) -> None:
    data = deltas[0].parent / "texts.txt"
    found = impart("eval", tiny_llama, tiny_llama_ft, deltas[0], "--data", data, "--json")
    record = json.loads(found.stdout)
    kl = record["variant"]["kl"]
    assert f"{kl['mean']:.3g} ± {kl['standard_error']:.1g}" in page


def without_texts(base: Path, tuned: Path, deltas: list[Path]) -> Report:
    return make_report(str(base), str(tuned), deltas, None, None, 4, lambda *_: None)


def test_spectra_equal_numpy_on_the_whole_matrices(
    tiny_llama: Path, tiny_llama_ft: Path, deltas: list[Path]
) -> None:
    report = without_texts(tiny_llama, tiny_llama_ft, deltas)
    base, tuned = (load_file(p / "model.safetensors") for p in (tiny_llama, tiny_llama_ft))
    kept = {delta.name: delta for delta in read_artifact(deltas[1]).tensors}
    assert len(report.spectra) == 9
    for found in report.spectra:
        exact = (tuned[found.tensor] - base[found.tensor]).double().numpy()
        ours = sum(term.to_dense() for term in kept[found.tensor].terms).double().numpy()
        for curve, matrix in ((found.finetuned, exact), (found.kept[1], ours)):
            sigma = np.linalg.svd(matrix, compute_uv=False)
            expected = sigma[np.array(curve.index) - 1]
            np.testing.assert_allclose(curve.sigma, expected, rtol=1e-4, atol=1e-5 * sigma[0])
            assert curve.total == pytest.approx(float((sigma**2).sum()), rel=1e-5)


def test_report_without_texts_has_no_quality(
    tiny_llama: Path, tiny_llama_ft: Path, deltas: list[Path]
) -> None:
    text = " ".join(Page(render(without_texts(tiny_llama, tiny_llama_ft, deltas[:1]))).text)
    assert "Singular values" in text
    assert "perplexity" not in text
    assert "KL by layer" not in text


def test_hostile_texts_of_an_artifact_are_shown_and_not_obeyed(
    tiny_llama: Path, tiny_llama_ft: Path, deltas: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "<b>&$x$"
    folder.mkdir()
    for file in deltas[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def change(record: dict[str, Any]) -> None:
        record |= {"created_by": HOSTILE, "codec": HOSTILE, "options": {HOSTILE: HOSTILE}}
        record["finetuned"]["name_or_path"] = record["base"]["name_or_path"] = HOSTILE
        record["bytes"] = {HOSTILE: sum(record["bytes"].values())}
        record["fidelity"] = {HOSTILE: [HOSTILE]}

    edit_config(folder, change)
    report = without_texts(tiny_llama, tiny_llama_ft, [folder, deltas[1]])
    page = render(report)
    parsed = Page(page)
    assert not {"script", "img", "b"} & set(parsed.tags)
    assert "<script" not in page
    assert "\x1b" not in page
    text = "".join(parsed.text)
    assert text.count(SCRIPT) >= 6
    assert "<b>&$x$" in text


def test_wrong_arguments_exit_2_and_write_nothing(
    tiny_llama: Path, tiny_llama_ft: Path, deltas: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "o.html"
    pair = (tiny_llama, tiny_llama_ft)
    for arguments, message in (
        ((*pair, out), "one or more delta"),
        ((*pair, deltas[0], tmp_path / "o.pdf"), "OUT.html"),
        ((*pair, deltas[0], deltas[0], out), "given twice"),
        ((tiny_llama_ft, tiny_llama, deltas[0], out), "made for base"),
        ((*pair, deltas[0], tmp_path / "none" / "o.html"), "cannot write"),
    ):
        done = impart("report", *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    assert "exists" in impart("report", *pair, deltas[0], out).stderr
    assert out.read_text() == "mine"
    assert impart("report", *pair, deltas[0], out, "--overwrite", "-q").exit_code == 0


@pytest.mark.parametrize("size", [1, 5, 120, 121, 4096])
def test_log_spaced_has_both_ends_and_no_repeats(size: int) -> None:
    found = log_spaced(size, 120)
    assert found[0] == 0
    assert found[-1] == size - 1
    assert found == sorted(set(found))
    assert len(found) <= 121
