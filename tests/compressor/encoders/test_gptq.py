"""GPTQ against its definition: a loop in float64 over one row's own support."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.codecs import ImpartQtTerm
from compressor.encoders import gptq
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import TensorSource, WithInputs
from tests.compressor.codec_oracles import check_term, payload, random_matrix

BITS = (8, 3, 2)


def hessian_of(n: int, seed: int = 0) -> Tensor:
    """Inputs of few strong directions and very different sizes, as layers see them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) * torch.arange(1, n + 1).float() ** -0.7
    x = torch.randn(4 * n, n, generator=generator) @ mix.T
    return (x.T @ x / len(x)).double()


def literal_row(row: np.ndarray, hessian: np.ndarray, steps: np.ndarray, bits: list[int]) -> list:
    """Round one value, re-solve the rest by least squares, go on: GPTQ without its algebra.

    With the values so far fixed, those to come minimise the error in the metric of the Hessian.
    """
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(len(row))
    target, left, codes = row.copy(), row.copy(), []
    for j in range(len(row)):
        half = 2 ** (bits[j] - 1)
        code = int(np.clip(np.floor(left[j] / steps[j]), -half, half - 1)) + half
        codes.append(code)
        left[j] = (code - (2 ** bits[j] - 1) / 2) * steps[j]
        rest = slice(j + 1, None)
        lost = target[: j + 1] - left[: j + 1]
        if j + 1 < len(row):
            pull = damped[rest, : j + 1] @ lost
            left[rest] = target[rest] + np.linalg.solve(damped[rest, rest], pull)
    return codes


def test_gptq_left_equals_solving_again_after_every_value() -> None:
    kept, block_rows, rank = (1, 2, 2), 3, 9
    index = torch.tensor([[0, 2, 4, 6, 8], [1, 3, 5, 7, 8]])
    values = random_matrix((5, 5), 1, 1.0)
    steps = torch.rand(rank, generator=torch.Generator().manual_seed(2)).double() + 0.2
    hessian = hessian_of(rank)
    codes = gptq.gptq_left(values, index, block_rows, kept, steps, hessian)
    bits = [8, 3, 3, 2, 2]
    for i in range(5):
        chosen = index[i // block_rows]
        local = hessian[chosen][:, chosen].numpy()
        expected = literal_row(values[i].double().numpy(), local, steps[chosen].numpy(), bits)
        assert codes[i].tolist() == expected


@pytest.mark.parametrize("window", [4, 256])
def test_gptq_right_equals_solving_again_on_each_support(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(gptq, "WINDOW", window)
    kept, block_rows, n = (1, 0, 1), 2, 10
    index = torch.tensor([[0, 2], [1, 2], [0, 3], [0, 2], [1, 2]])
    values = random_matrix((n, 2), 3, 1.0)
    steps = torch.tensor([0.02, 0.03, 0.9, 0.7]).double()
    hessian = hessian_of(n, 5)
    codes = gptq.gptq_right(values, index, block_rows, kept, steps, hessian)
    by_row = index.repeat_interleave(block_rows, 0)
    for component, bits in ((0, 8), (1, 8), (2, 2), (3, 2)):
        column = 0 if bits == 8 else 1
        support = [j for j in range(n) if by_row[j, column] == component]
        for start in range(0, len(support), window):
            run = sorted(support[start : start + window], key=lambda j: -float(hessian[j, j]))
            expected = literal_row(
                values[run, column].double().numpy(),
                hessian[run][:, run].numpy(),
                np.full(len(run), float(steps[component])),
                [bits] * len(run),
            )
            assert codes[run, column].tolist() == expected


def test_gptq_inputs_never_active_are_rounded_to_nearest() -> None:
    codes = gptq.gptq_right(
        torch.tensor([[0.204], [-0.696], [0.906]]),
        torch.tensor([[0], [0]]),
        2,
        (1, 0, 0),
        torch.tensor([0.01]).double(),
        torch.zeros(3, 3).double(),
    )
    assert codes.flatten().tolist() == [148, 58, 218]


@pytest.mark.parametrize("shape", [(96, 64), (48, 80)])
def test_impart_qt_with_inputs_has_less_output_error_at_equal_bytes(shape) -> None:
    """Against the same draw without rounding: GPTQ makes up for rounding, not for sampling."""
    hessian = hessian_of(shape[1], 7)
    k = min(shape)
    u, v = (torch.linalg.qr(random_matrix((size, k), size, 1.0))[0] for size in shape)
    matrix = (u * torch.arange(1, k + 1).float() ** -0.4) @ v.T
    codec = make_encoder("impart-qt", beta=0.0, block_rows=8, gptq=True)
    params = codec.fit(shape, shape[0] * shape[1] / 3)
    plain = codec.encode("w", TensorSource(matrix), params, 0)[0]
    calibrated = codec.encode("w", WithInputs(TensorSource(matrix), hessian), params, 0)[0]
    assert isinstance(calibrated, ImpartQtTerm)
    assert isinstance(plain, ImpartQtTerm)
    assert (plain.settings["gptq"], calibrated.settings["gptq"]) == (False, True)
    assert payload((calibrated,)) == payload((plain,)) == params["payload"]
    check_term(calibrated)
    exact = unrounded(plain, u, v)
    errors = [
        float(((off := term.to_dense().double() - exact) @ hessian * off).sum())
        for term in (plain, calibrated)
    ]
    assert errors[1] < 0.8 * errors[0]


def unrounded(term: ImpartQtTerm, u: Tensor, v: Tensor) -> Tensor:
    """The drawn components of a matrix of known singular vectors, not quantised."""
    parts = term.factors()
    q = term.weights.double() / 2**15
    sides = []
    for vectors, index in ((u, parts.u_index), (v, parts.v_index)):
        mask = torch.zeros(len(index), term.rank).scatter_(1, index, 1.0)
        rows = mask.repeat_interleave(term.block_rows, 0)[: len(vectors)]
        sides.append(vectors[:, : term.rank].double() * rows)
    sigma = torch.arange(1, term.rank + 1).double() ** -0.4 / q.square()
    return (sides[0] * sigma) @ sides[1].T
