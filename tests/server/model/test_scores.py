"""What stands for attention's scores notes what is done to them, and knows what it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils

from server.model.mask import HandedMask
from server.model.scores import Recipe, Scores, ScoresUsed

MASK = HandedMask(masking_utils.causal_mask_function, torch.device("cpu"))
BIAS = torch.arange(5.0)


def scores(recipe: Recipe | None, ndim: int = 4) -> Scores:
    def attend(_: Scores, v: Tensor) -> Tensor:
        return v + 1

    return Scores(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), ndim, recipe, attend)


def test_scores_scales_masks_and_biases_are_noted_in_their_order() -> None:
    recipe = Recipe()
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    made: Any = scores(recipe) + BIAS
    made = (made / math.sqrt(16)).float()
    made = torch.where(seen, made, torch.tensor(-1e9)) + MASK
    made = torch.max(made, torch.tensor(torch.finfo(torch.float32).min))
    made = F.dropout(F.softmax(made, dim=-1, dtype=torch.float32), training=False)
    v = torch.randn(1, 2, 5, 4)
    assert torch.equal(torch.matmul(made.to(v.dtype), v), v + 1)
    assert recipe.scale == 0.25
    assert recipe.masks == [seen, MASK]
    assert torch.equal(recipe.biases[0], BIAS / 4)


def test_scores_of_three_axes_take_and_give_three() -> None:
    v = torch.randn(2, 5, 4)
    made = scores(None, ndim=3)
    assert made.shape == (2, 5, 5)
    assert made.view(1, 2, 5, -1).shape == (1, 2, 5, 5)
    assert torch.equal(torch.bmm(made.view(2, 5, 5).softmax(-1), v), v + 1)


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.topk(2),
        lambda s: torch.logsumexp(s, -1),
        lambda s: F.softmax(s, dim=1),
        lambda s: s * BIAS,
        lambda s: torch.where(BIAS > 0, BIAS, s),
        lambda s: s @ scores(None),
        lambda s: s.view(10, 5),
        lambda s: torch.max(s, torch.tensor(-5.0)),
    ],
)
def test_scores_used_in_any_other_way_are_refused(use: Callable[[Any], object]) -> None:
    with pytest.raises(ScoresUsed, match="attention"):
        use(scores(Recipe()))
