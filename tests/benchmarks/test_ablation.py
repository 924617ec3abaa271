"""The ablation's variants differ in what they claim to, and in nothing else."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation import VARIANTS, Variant, allocate, encode_variants
from compressor.codecs.impart_sampling import FIXED_POINT
from compressor.encoders.impart import ImpartCodec
from compressor.encoders.sources import TensorSource
from tests.compressor.codec_oracles import payload, random_matrix
from tests.tiny import make_tiny, perturb

SIGMA = np.arange(1, 101) ** -0.5


def by_name(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_allocate_every_variant_keeps_equally_many(variant: Variant) -> None:
    found = allocate(variant, SIGMA, 12, 0.6, 1.0)
    assert int(found.inclusion.sum()) == 12 << FIXED_POINT


def test_allocate_leaves_out_what_the_name_says() -> None:
    found = {v.name: allocate(v, SIGMA, 12, 0.6, 1.0).probabilities for v in VARIANTS}
    np.testing.assert_allclose(found["no importance"], 12 / 40)
    np.testing.assert_allclose(found["neither"], 12 / 100)
    assert len(found["ImPart"]) < len(found["no pre-pruning"]) < 100
    assert (np.diff(found["ImPart"]) <= 1e-9).all()
    np.testing.assert_array_equal(found["ImPart"], found["no rescale"])


def test_encode_variants_equal_bytes_and_only_the_rescale_differs() -> None:
    u, v = (torch.linalg.qr(random_matrix((n, 60), n, 1.0))[0] for n in (96, 60))
    matrix = (u * torch.arange(1, 61) ** -0.5) @ v.T
    codec = ImpartCodec(block_rows=8)
    terms = {
        variant: term
        for variant, _, term in encode_variants("w", TensorSource(matrix), codec, 3000, 1)
    }
    assert len({payload((term,)) for term in terms.values()}) == 1
    whole, plain = terms[by_name("ImPart")], terms[by_name("no rescale")]
    assert torch.equal(whole.u_index, plain.u_index)
    assert float(whole.to_dense().norm()) > 1.2 * float(plain.to_dense().norm())


def test_ablation_on_a_tiny_pair_prints_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny("llama", tmp_path / "base", seed=1)
    tuned = perturb(base, tmp_path / "tuned", seed=2, scale=0.3)
    data = tmp_path / "test.csv"
    with data.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("text", "category"), ("my card is lost", "lost_card"), ("hi", "greeting")])
    arguments = ["--base", base, "--finetuned", tuned, "--task", "intent", "--data", data]
    arguments += ["--items", 2, "--texts", 2, "--ratio", 6]
    assert ablation.main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "fine-tune",
        *(variant.name for variant in VARIANTS),
    ]
    kl = [float(line.split("|")[2]) for line in lines[3:]]
    assert all(0 < value < 50 for value in kl)
