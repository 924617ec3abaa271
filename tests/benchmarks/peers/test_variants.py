"""The variants that are served: as many as asked for, all different, all valid."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.peers.errors import PeersError
from benchmarks.peers.variants import first_variants, main, mean_disk_bytes
from compressor.artifact.identity import base_identity
from compressor.artifact.reader import read_artifact
from compressor.codecs.blockdiag import BlockDiagTerm

N_REAL, N_ALL = 2, 5


@pytest.fixture(scope="module")
def folder(
    tiny_llama: Path,
    tiny_llama_ft: Path,
    tiny_llama_ft2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("peers")
    tuned = ["--finetuned", str(tiny_llama_ft), "--finetuned", str(tiny_llama_ft2)]
    common = ["--base", str(tiny_llama), *tuned, "--dir", str(out), "--ratio", "8"]
    assert main([*common, "--rank", "4", "--count", "3"]) == 0
    assert main([*common, "--rank", "4", "--count", str(N_ALL)]) == 0  # goes on from there
    return out


def test_deltas_are_valid_and_differ_in_every_matrix(folder: Path, tiny_llama: Path) -> None:
    paths = sorted((folder / "variants" / "deltas").iterdir())
    artifacts = [read_artifact(path) for path in paths]
    assert [path.name for path in paths] == ["v000", "v001", "v002", "v003", "v004"]
    assert len({artifact.digest for artifact in artifacts}) == N_ALL
    for index in range(len(artifacts[0].tensors)):
        deltas = [artifact.tensors[index] for artifact in artifacts]
        terms = [term for delta in deltas for term in delta.terms]
        if not terms:
            continue
        codes = [term.codes for term in terms if isinstance(term, BlockDiagTerm)]
        assert len(codes) == N_ALL
        assert not [
            (i, j) for i in range(N_ALL) for j in range(i) if torch.equal(codes[i], codes[j])
        ]
        for shuffled in range(N_REAL, N_ALL):
            real = codes[shuffled % N_REAL]
            assert torch.equal(codes[shuffled].sort().values, real.sort().values)


def test_deltas_name_the_base(folder: Path, tiny_llama: Path) -> None:
    identity = base_identity(tiny_llama)
    for path in (folder / "variants" / "deltas").iterdir():
        read_artifact(path, base_identity=identity)


def test_adapters_have_distinct_factors(folder: Path) -> None:
    files = (folder / "variants" / "adapters").glob("*/adapter_model.safetensors")
    assert len({file.read_bytes() for file in files}) == N_ALL


def test_checkpoints_alternate_between_the_finetunes(
    folder: Path, tiny_llama_ft: Path, tiny_llama_ft2: Path
) -> None:
    paths = sorted((folder / "variants" / "checkpoints").iterdir())
    assert [path.resolve() for path in paths[:3]] == [tiny_llama_ft, tiny_llama_ft2, tiny_llama_ft]


@pytest.mark.parametrize("form", ["deltas", "adapters", "checkpoints"])
def test_first_variants_holds_exactly_so_many(folder: Path, form: str) -> None:
    for _ in range(2):  # the second time it is there already
        served = first_variants(folder / "variants", form, 3)
        assert sorted(path.name for path in served.iterdir()) == ["v000", "v001", "v002"]
    one = served / "v001"
    inside = sum(file.stat().st_size for file in one.resolve().rglob("*") if file.is_file())
    assert mean_disk_bytes(served) == pytest.approx(inside, rel=0.05)


def test_first_variants_too_few_is_refused(folder: Path) -> None:
    with pytest.raises(PeersError, match=r"lacks v005 and 2 more: run .* --count 8"):
        first_variants(folder / "variants", "adapters", 8)


def test_first_variants_half_made_is_completed(folder: Path) -> None:
    served = first_variants(folder / "variants", "adapters", 2)
    shutil.rmtree(served / "v001")
    assert (first_variants(folder / "variants", "adapters", 2) / "v001").exists()
