"""Room made beside the steps: nothing that they read changes before it is opened."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.codecs import TensorDelta, Term
from compressor.encoders.codec import make_encoder
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.room import Room
from server.deltas.upload import SlotUploader
from server.ops.kernels import TorchKernels
from server.ops.row_mapping import RowMapping, Segment
from tests.compressor.codec_oracles import encode, random_matrix

CPU = torch.device("cpu")
SHAPE = (24, 16)


def terms(seed: int, codec: str = "blockdiag") -> tuple[Term, ...]:
    params = {"bits": 4, "n_blocks": 4} if codec == "blockdiag" else {"bits": 4, "rank": 3}
    return encode(make_encoder(codec, bits=4), random_matrix(SHAPE, seed), params)


def parameters(count: int = 1) -> list[DeltaParameter]:
    """That many matrices which read the same input."""
    kernels = TorchKernels()
    made = [DeltaParameter(f"w{i}", random_matrix(SHAPE, i), kernels) for i in range(count)]
    for parameter in made:
        parameter.siblings = tuple(made)
    return made


def staged(parameter: DeltaParameter, made: tuple[Term, ...]) -> StagedParameter:
    return parameter.stage(TensorDelta(parameter.name, SHAPE, SHAPE, False, made, None))


def load(room: Room, parts: list[StagedParameter]) -> None:
    room.make(parts)
    SlotUploader(CPU).copy(list(room.transfers(parts)))


def put(slot: int, parts: list[StagedParameter]) -> None:
    room = Room(slot, parts)
    load(room, parts)
    list(room.opening())
    for part in parts:
        part.parameter.show(slot, part)


def added(parameter: DeltaParameter, slot: int, x: Tensor) -> Tensor:
    y, rows = torch.zeros(len(x), SHAPE[0]), RowMapping([Segment(slot, 0, len(x))], CPU)
    for pool in parameter.pools_for(rows):
        pool.add_(y, x, rows)
    return y


def dense(made: tuple[Term, ...], x: Tensor) -> Tensor:
    total = torch.stack([term.to_dense() for term in made]).sum(0)
    return x.double().matmul(total.double().T).float()


@pytest.mark.parametrize("n_siblings", [1, 3])
@pytest.mark.parametrize("codec", ["blockdiag", "lowrank"])
def test_room_changes_nothing_before_it_is_opened(codec: str, n_siblings: int) -> None:
    matrices = parameters(n_siblings)
    put(0, [staged(matrix, terms(i, codec)) for i, matrix in enumerate(matrices)])
    x = random_matrix((3, SHAPE[1]), 9, 1.0)
    before = [added(matrix, 0, x) for matrix in matrices]
    arrays = [[pool.arrays for pool in matrix.pools.values()] for matrix in matrices]
    parts = [staged(matrix, terms(10 + i, codec)) for i, matrix in enumerate(matrices)]
    room = Room(1, parts)
    load(room, parts)
    for matrix, known, want in zip(matrices, arrays, before, strict=True):
        assert all(p.arrays is a for p, a in zip(matrix.pools.values(), known, strict=True))
        assert torch.equal(added(matrix, 0, x), want)
    list(room.opening())
    for part in parts:
        part.parameter.show(1, part)
    for i, (matrix, want) in enumerate(zip(matrices, before, strict=True)):
        assert torch.equal(added(matrix, 0, x), want)
        torch.testing.assert_close(added(matrix, 1, x), dense(terms(10 + i, codec), x))


def test_room_of_another_geometry_adds_its_pools_when_it_is_opened() -> None:
    (matrix,) = parameters()
    put(0, [staged(matrix, terms(0))])
    parts = [staged(matrix, terms(1, "lowrank"))]
    room = Room(1, parts)
    load(room, parts)
    assert len(matrix.pools) == 1
    list(room.opening())
    assert len(matrix.pools) == 2


def test_room_that_is_given_up_leaves_nothing() -> None:
    (matrix,) = parameters()
    put(0, [staged(matrix, terms(0))])
    for made in (terms(1), terms(1, "lowrank")):
        parts = [staged(matrix, made)]
        load(Room(1, parts), parts)
        matrix.hide(1)
    (pool,) = matrix.pools.values()
    assert pool.capacity == 1
    put(1, [staged(matrix, terms(2))])
    assert pool.capacity == 2
    matrix.hide(0)
    matrix.hide(1)
    assert not matrix.pools


def test_slot_that_a_sibling_gave_up_meanwhile_adds_nothing_there_afterwards() -> None:
    matrices = parameters(2)
    put(0, [staged(matrix, terms(i)) for i, matrix in enumerate(matrices)])
    parts = [staged(matrix, terms(5 + i)) for i, matrix in enumerate(matrices)]
    room = Room(1, parts)
    load(room, parts)
    (pool,) = matrices[1].pools.values()
    pool.hide(0)
    list(room.opening())
    for part in parts:
        part.parameter.show(1, part)
    x = random_matrix((2, SHAPE[1]), 9, 1.0)
    torch.testing.assert_close(added(matrices[0], 0, x), dense(terms(0), x))
    assert not added(matrices[1], 0, x).any()
    torch.testing.assert_close(added(matrices[1], 1, x), dense(terms(6), x))


def test_pool_whose_last_slot_goes_meanwhile_is_there_when_the_room_is_opened() -> None:
    (matrix,) = parameters()
    put(0, [staged(matrix, terms(0))])
    parts = [staged(matrix, terms(1))]
    room = Room(1, parts)
    matrix.hide(0)  # before the loader's thread begins
    load(room, parts)
    list(room.opening())
    matrix.show(1, parts[0])
    x = random_matrix((2, SHAPE[1]), 9, 1.0)
    torch.testing.assert_close(added(matrix, 1, x), dense(terms(1), x))
