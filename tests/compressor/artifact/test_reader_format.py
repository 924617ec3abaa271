"""FORMAT.md is enough: a reader written from it decodes what the project's own decodes."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compressor.artifact.certificate import dump_certificate
from compressor.artifact.config import dump_config
from compressor.artifact.identity import base_identity
from compressor.artifact.reader import read_artifact
from compressor.checkpoint.companions import COMPANIONS
from compressor.codecs import TensorDelta, Term
from tests.compressor.artifact import format_reader
from tests.compressor.artifact.every_codec import (
    every_term,
    every_term_in_columns,
    write_every_codec,
)
from tests.compressor.artifact.test_certificate import FOUND
from tests.compressor.codec_oracles import random_matrix

pytest.importorskip("zstandard")
ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "compressor" / "artifact" / "FORMAT.md").read_text(encoding="utf-8")
DEMO = sorted((ROOT / "deploy" / "demo" / "deltas").iterdir())
# Artifacts of `every_codec`, written by the releases that wrote these versions first.
STORED = sorted((Path(__file__).parent / "data").iterdir())
SMALL = 1 << 16  # elements; adding terms to a base is no different for large parameters
ROUNDED_ONCE = ("blockdiag", "rows")  # the values of the others are sums, in any order


def check_same(path: Path) -> None:
    """Both readers decode the artifact to the same values."""
    artifact = read_artifact(path)
    digest, config, tensors = format_reader.read(path)
    assert digest == artifact.digest
    assert config["base"]["identity"] == artifact.config.base.identity
    assert [tensor.entry["name"] for tensor in tensors] == [d.name for d in artifact.tensors]
    for delta, tensor in zip(artifact.tensors, tensors, strict=True):
        for term, dense in zip(delta.terms, tensor.terms, strict=True):
            check_dense(term, dense)
        if np.prod(delta.shape) <= SMALL:
            check_value(delta, tensor)


def check_dense(term: Term, dense: np.ndarray) -> None:
    want, got = term.to_dense(), torch.from_numpy(dense)
    if term.codec in ROUNDED_ONCE:
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * float(want.abs().max()))


def check_value(delta: TensorDelta, tensor: format_reader.Tensor) -> None:
    n = int(np.prod(delta.base_shape))
    base = torch.arange(n, dtype=torch.float32).remainder(7).reshape(delta.base_shape)
    want, got = delta.reconstruct(base), torch.from_numpy(tensor.value(base.numpy()))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert (tensor.exact is None) == (delta.exact is None)
    if delta.exact is not None:
        start, end = delta.exact.row_start, delta.exact.row_start + len(delta.exact.values)
        assert torch.equal(got[start:end], delta.exact.values.float())


@pytest.mark.parametrize("coded", [False, True])
def test_format_reader_of_every_codec_decodes_the_projects_values(
    tmp_path: Path, coded: bool
) -> None:
    digest = write_every_codec(tmp_path / "delta", coded=coded)
    found, config, _ = format_reader.read(tmp_path / "delta")
    assert (found, config["format_version"], "coding" in config) == (digest, 3, coded)
    check_same(tmp_path / "delta")


def test_terms_of_even_sizes_are_stored_in_kernel_order() -> None:
    for name, (term,) in every_term_in_columns():
        parts = term.tensors()
        codes = [parts[part] for part in ("codes", "a", "b") if part in parts]
        assert all(part.ndim > 1 for part in codes), name


@pytest.mark.parametrize("path", [*STORED, *DEMO], ids=lambda path: path.name)
def test_format_reader_of_stored_artifacts_decodes_the_projects_values(path: Path) -> None:
    check_same(path)


def test_stored_artifacts_are_of_every_version_and_of_the_same_values() -> None:
    """What a release has written reads to the same values ever after."""
    read = [format_reader.read(path) for path in STORED]
    assert [config["format_version"] for _, config, _ in read] == [1, 2, 3]
    first, *others = ({t.entry["name"]: t for t in tensors} for _, _, tensors in read)
    for other in others:
        for name, tensor in first.items():
            for want, got in zip(tensor.terms, other[name].terms, strict=True):
                assert np.array_equal(want, got), name


def test_format_reader_of_a_base_finds_its_identity(tmp_path: Path) -> None:
    config = {"torch_dtype": "x", "b": [{"dtype": "y", "c": "é"}], "a": 1, "_name_or_path": "z"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    large = random_matrix((130, 141))
    save_file({"z": large, "a": large[0].half()}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"m": large[:, 0].bfloat16()}, tmp_path / "model-00002-of-00002.safetensors")
    shards = sorted(tmp_path.glob("*.safetensors"))
    places = {"z": shards[0].name, "a": shards[0].name, "m": shards[1].name}
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = format_reader.base_identity(config, [shard.read_bytes() for shard in shards])
    assert found == base_identity(tmp_path)


def test_format_reader_uses_nothing_but_the_page() -> None:
    source = Path(format_reader.__file__).read_text(encoding="utf-8")
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }
    assert imported == {
        "__future__", "hashlib", "itertools", "json", "pathlib", "struct", "typing",
        "numpy", "zstandard",
    }  # fmt: skip


def test_page_names_every_codec_parameter_and_part() -> None:
    terms = [term for _, terms in every_term() for term in terms]
    for word in sorted({w for t in terms for w in (t.codec, *t.params(), *t.tensors())}):
        assert f"`{word}`" in PAGE, word


def test_page_names_every_field_of_the_configuration_and_no_other(tmp_path: Path) -> None:
    write_every_codec(tmp_path / "delta", coded=True)
    config = read_artifact(tmp_path / "delta").config
    section = PAGE.partition("## 5.")[2].partition("## 6.")[0]
    named = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    named |= {"kl_per_token", "top1_agreement", "n_tokens", "n_texts", "coder", "raw_bytes"}
    fields = set(re.findall(r'"(\w+)":', dump_config(config).decode()))
    free = {*config.bytes, *config.options, *config.fidelity}
    free |= {key for t in config.tensors for term in t.terms for key in term.params}
    assert fields - free - named - {"codec", "params", "row_start", "coder", "raw_bytes"} == set()
    for field in fields - free:
        assert f"`{field}`" in section, field


def test_page_lists_the_auxiliary_files_that_an_artifact_may_hold() -> None:
    section = PAGE.partition("## 1.")[2].partition("## 2.")[0]
    assert all(f"`{name}`" in section for name in COMPANIONS)


def test_page_names_every_field_of_the_certificate_and_no_other() -> None:
    section = PAGE.partition("## 10.")[2].partition("## 11.")[0]
    named = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    )
    raw = json.loads(dump_certificate(FOUND))
    assert named == raw.keys() | raw["prompts"][0].keys()
