"""Biases that grow with the distance, against attention with those biases written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from server.model.alibi import alibi_of
from server.model.scores import ScoresUsed

HEADS, TOKENS, SCALE = 4, 11, 0.25
SLOPES = torch.tensor([0.5, 0.0221, 2.0**-8, 0.0])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_alibi_added_dimensions_give_the_biased_attention(dtype: torch.dtype, bound: float) -> None:
    bias = SLOPES.view(-1, 1, 1) * torch.arange(TOKENS)
    alibi = alibi_of([bias.unsqueeze(0)], HEADS, TOKENS, SCALE)
    assert alibi is not None
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, TOKENS, 16).to(dtype) for _ in range(3))
    positions = 1990 + torch.arange(TOKENS)  # far into a sequence
    wide_q, wide_k = alibi.joined(q, k, positions)
    assert wide_q.dtype == wide_k.dtype == dtype
    scores = wide_q.float() @ wide_k.float().transpose(2, 3) * SCALE
    wanted = q.float() @ k.float().transpose(2, 3) * SCALE + bias - bias[:, -1:, -1:]
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    found, right = (
        F.softmax(s.masked_fill(~causal, float("-inf")), -1) @ v.float() for s in (scores, wanted)
    )
    assert (found - right).abs().max() < bound


def test_alibi_of_no_bias_is_none() -> None:
    assert alibi_of([], HEADS, TOKENS, SCALE) is None


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        (torch.randn(1, HEADS, TOKENS, TOKENS), "does not grow evenly"),
        (torch.zeros(1, HEADS, TOKENS, TOKENS), "may be a mask"),
        (torch.ones(TOKENS, TOKENS, dtype=torch.bool), "no number"),
    ],
)
def test_alibi_of_any_other_bias_is_refused(bias: torch.Tensor, says: str) -> None:
    with pytest.raises(ScoresUsed, match=says):
        alibi_of([bias], HEADS, TOKENS, SCALE)
