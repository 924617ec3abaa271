"""Values that each slot has whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.codecs.term import DenseRows, TensorDelta
from compressor.encoders.codec import make_encoder
from compressor.errors import WrongShape
from server.deltas.residency import Residency
from server.deltas.upload import SlotUploader
from server.deltas.whole import WholeParameter
from server.ops.kernels import TorchKernels
from tests.compressor.codec_oracles import encode, random_matrix

SHAPES = [(7,), (1, 7), (5, 8)]


def whole(base: Tensor) -> WholeParameter:
    return WholeParameter("gate", base, TorchKernels(), Residency())


def put(parameter: WholeParameter, slot: int, delta: TensorDelta) -> None:
    staged = parameter.stage(delta)
    parameter.reserve(slot, staged, 4)
    assert slot not in parameter.own
    SlotUploader(torch.device("cpu")).copy(list(parameter.transfers(slot, staged)))
    parameter.show(slot, staged)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_value_is_the_slots_until_it_is_hidden(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    parameter = whole(torch.rand(shape).to(dtype))
    value = torch.rand(shape).to(dtype)
    put(parameter, 3, TensorDelta("gate", shape, shape, False, (), DenseRows(0, value)))
    assert torch.equal(parameter.own[3], value)
    assert 3 in parameter.residency.eager
    parameter.hide(3)
    assert not parameter.own
    assert not parameter.residency.eager


def test_terms_are_added_to_the_base_value() -> None:
    base = random_matrix((24, 16), 1)
    parameter = whole(base)
    terms = encode(
        make_encoder("lowrank", bits=4), random_matrix((24, 16), 2), {"bits": 4, "rank": 3}
    )
    put(parameter, 0, TensorDelta("gate", (24, 16), (24, 16), False, terms, None))
    want = base.double() + sum(term.to_dense().double() for term in terms)
    torch.testing.assert_close(parameter.own[0].double(), want, rtol=1e-6, atol=1e-6)


def test_value_of_another_shape_is_refused() -> None:
    with pytest.raises(WrongShape, match="gate"):
        whole(torch.rand(5, 8)).stage(TensorDelta("gate", (5, 9), (5, 9), False, (), None))
