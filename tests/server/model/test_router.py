"""Routers whose weights are each slot's own, against the definition run row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.codecs.term import DenseRows, TensorDelta
from server.deltas.residency import Residency
from server.deltas.whole import WholeParameter
from server.model.context import StepContext
from server.model.router import split_routers
from server.ops.kernels import TorchKernels
from server.ops.row_mapping import BASE_SLOT, RowMapping, Segment

CPU = torch.device("cpu")
WIDTH, N_EXPERTS, TOP = 6, 5, 2


class Router(nn.Module):
    """As the definitions have them: a weight, a bias for the choice alone, one from the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_EXPERTS, WIDTH), requires_grad=False)
        self.correction: Tensor
        self.register_buffer("correction", torch.randn(N_EXPERTS))
        self.register_buffer("computed", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor, expert_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.reshape(-1, WIDTH)
        logits = F.linear(x, self.weight)
        chosen = torch.topk(logits + self.correction + expert_bias, TOP, dim=-1).indices
        return logits, logits.softmax(-1).gather(1, chosen), chosen


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = Router()
        self.expert_bias = nn.Parameter(torch.randn(N_EXPERTS), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = self.gate(x, self.expert_bias)
        return result


def own(parameter: WholeParameter, slot: int) -> Tensor:
    """Give a slot a value of its own; return it."""
    value = torch.randn(parameter.shape)
    delta = TensorDelta(
        parameter.name, parameter.shape, parameter.shape, False, (), DenseRows(0, value)
    )
    staged = parameter.stage(delta)
    parameter.reserve(slot, staged, 8)
    for place, source in parameter.transfers(slot, staged):
        place.copy_(source)
    parameter.show(slot, staged)
    return value


@pytest.fixture
def split() -> tuple[Block, StepContext, dict[str, WholeParameter]]:
    block, context, made = Block(), StepContext(), {}

    def make(name: str, value: Tensor) -> WholeParameter:
        made[name] = WholeParameter(name, value.detach(), TorchKernels(), Residency())
        return made[name]

    split_routers(block, "mlp", context, make, ())
    return block, context, made


Split = tuple[Block, StepContext, dict[str, WholeParameter]]


def test_values_that_checkpoints_hold_are_found(split: Split) -> None:
    assert set(split[2]) == {"mlp.gate.weight", "mlp.gate.correction", "mlp.expert_bias"}


@pytest.mark.parametrize("shape", [(-1, WIDTH), (1, -1, WIDTH)])
@pytest.mark.parametrize(
    "sizes", [(2, 1, 3, 4, 1), (0, 1, 1, 1, 1), (0, 0, 0, 4, 0), (3, 0, 0, 0, 0)]
)
def test_each_slots_rows_are_routed_by_its_own_values(
    split: Split, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Slots 1 and 3 have their own of everything, 4 of the parent's bias, 2 and the base none."""
    block, context, made = split
    values = {
        (slot, name): own(made[name], slot)
        for slot, names in {1: list(made), 3: list(made), 4: ["mlp.expert_bias"]}.items()
        for name in names
    }
    slots = [BASE_SLOT, 1, 2, 3, 4]
    segments, start = [], 0
    for slot, size in zip(slots, sizes, strict=True):
        if size:
            segments.append(Segment(slot, start, start + size))
            start += size
    context.rows = rows = RowMapping(segments, CPU)
    x = torch.randn(start, WIDTH)
    got = block(x.view(shape))
    assert context.rows is rows
    plain = Block()
    for i, slot in enumerate(rows.slot_of_row.tolist()):
        fresh = plain.state_dict()
        for name in made:
            fresh[name.removeprefix("mlp.")] = values.get((slot, name), made[name].base)
        alone = Block()
        alone.load_state_dict(fresh)
        for one, whole in zip(alone(x[i : i + 1]), got, strict=True):
            torch.testing.assert_close(one[0], whole[i])


def test_value_in_place_is_the_bases_again_after_an_error(split: Split) -> None:
    block, context, made = split
    own(made["mlp.gate.weight"], 0)
    context.rows = RowMapping([Segment(BASE_SLOT, 0, 1), Segment(0, 1, 2)], CPU)
    with pytest.raises(RuntimeError, match="shape"):
        block(torch.randn(2, WIDTH + 1))
    assert block.gate.weight is not made["mlp.gate.weight"].own[0]
    assert torch.equal(block.gate.weight, made["mlp.gate.weight"].base)


def test_module_that_does_not_give_a_row_a_row_is_an_error() -> None:
    class Sums(Router):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return F.linear(x, self.weight).sum(0, keepdim=True)

    block, context, made = Block(), StepContext(), {}
    block.gate = Sums()

    def make(name: str, value: Tensor) -> WholeParameter:
        made[name] = WholeParameter(name, value.detach(), TorchKernels(), Residency())
        return made[name]

    split_routers(block, "", context, make, ())
    own(made["gate.weight"], 0)
    context.rows = RowMapping([Segment(BASE_SLOT, 0, 1), Segment(0, 1, 3)], CPU)
    with pytest.raises(RuntimeError, match="one row for each row"):
        block.gate(torch.randn(3, WIDTH))
