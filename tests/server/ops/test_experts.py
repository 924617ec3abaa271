"""Products of experts against loops over single choices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.ops.experts import ExpertRows, grouped_linear
from server.ops.row_mapping import BASE_SLOT, RowMapping, Segment

CPU = torch.device("cpu")
N_EXPERTS = 5
ROWS = RowMapping([Segment(BASE_SLOT, 0, 3), Segment(0, 3, 4), Segment(4, 4, 9)], CPU)


def chosen(n_chosen: int, seed: int = 0, experts: tuple[int, ...] = (0, 1, 3, 4)) -> Tensor:
    """Different experts for each row; nobody chooses expert 2."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(experts), generator=generator) for _ in range(ROWS.n_rows)]
    return torch.tensor(experts)[torch.stack(orders)[:, :n_chosen]]


@pytest.mark.parametrize("n_chosen", [1, 2, 4])
def test_rows_are_sorted_by_expert_then_slot(n_chosen: int) -> None:
    picks = chosen(n_chosen)
    rows = ExpertRows.of_choices(picks, ROWS)
    want = sorted(
        (int(picks[t, j]), int(ROWS.slot_of_row[t]), t, j)
        for t in range(ROWS.n_rows)
        for j in range(n_chosen)
    )
    assert rows.tokens.tolist() == [t for _, _, t, _ in want]
    assert rows.experts.tolist() == [expert for expert, *_ in want]
    for segment in rows.segments:
        for expert, slot, *_ in want[segment.start : segment.end]:
            assert (expert, slot) == (segment.expert, segment.slot)
    assert [s.start for s in rows.segments[1:]] == [s.end for s in rows.segments[:-1]]
    assert rows.by_slot.slot_of_row.tolist() == [slot for _, slot, *_ in want]
    by_pair = rows.by_pair(N_EXPERTS).slot_of_row.tolist()
    assert by_pair == [
        BASE_SLOT if slot == BASE_SLOT else slot * N_EXPERTS + expert for expert, slot, *_ in want
    ]


def test_restore_puts_each_choice_back() -> None:
    picks = chosen(2)
    rows = ExpertRows.of_choices(picks, ROWS)
    sorted_picks = picks.reshape(-1, 1).double()[rows.order]
    assert torch.equal(rows.restore(sorted_picks)[:, :, 0], picks.double())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_linear_equals_a_product_a_choice(turned: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(N_EXPERTS, 6, 11, generator=generator).to(dtype)
    x = torch.randn(ROWS.n_rows * 2, 11, generator=generator).to(dtype)
    rows = ExpertRows.of_choices(chosen(2), ROWS)
    stored = weight.transpose(1, 2).contiguous() if turned else weight
    got = grouped_linear(x, stored, rows.spans, turned=turned)
    want = torch.stack(
        [weight[e].double() @ row.double() for e, row in zip(rows.experts, x, strict=True)]
    )
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol)
    assert got.dtype == dtype
