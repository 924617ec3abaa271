"""Terms of experts: one place for each expert and slot, all in one product."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compressor.codecs.term import DenseRows, TensorDelta, Term
from compressor.encoders.codec import make_encoder
from compressor.errors import WrongShape
from server.deltas.experts import ExpertParameter, ExpertsProjection
from server.deltas.parameter import StagedParameter
from server.deltas.residency import Residency
from server.deltas.room import Room
from server.deltas.upload import SlotUploader
from server.ops.kernels import TorchKernels
from server.ops.row_mapping import BASE_SLOT, RowMapping, Segment
from tests.compressor.codec_oracles import encode, random_matrix

CPU = torch.device("cpu")
SHAPE, N_EXPERTS = (24, 16), 5
PARAMS = {
    "blockdiag": {"bits": 4, "n_blocks": 4},
    "lowrank": {"bits": 4, "rank": 3},
    "impart": {"kept": 4, "block_rows": 8},
}


def terms(seed: int, codec: str) -> tuple[Term, ...]:
    return encode(make_encoder(codec, bits=4), random_matrix(SHAPE, seed), PARAMS[codec])


def experts(*, turned: bool = False) -> tuple[ExpertsProjection, list[ExpertParameter]]:
    residency = Residency(n_slots=8)
    home = ExpertsProjection("w", random_matrix(SHAPE, 0), N_EXPERTS, TorchKernels(), residency)
    made = [
        ExpertParameter(f"w[{e}]", random_matrix(SHAPE, e), home, e, turned=turned, counted=True)
        for e in range(N_EXPERTS)
    ]
    return home, made


def delta(expert: ExpertParameter, made: Sequence[Term]) -> TensorDelta:
    return TensorDelta(expert.name, SHAPE, SHAPE, False, tuple(made), None)


def put(slot: int, parts: Sequence[StagedParameter]) -> None:
    room = Room(slot, parts)
    room.make(parts)
    SlotUploader(CPU).copy(list(room.transfers(parts)))
    list(room.opening())
    for part in parts:
        part.parameter.show(slot, part)


def added(home: ExpertsProjection, x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """What the pools add to one row for each (slot, expert)."""
    named = [BASE_SLOT if s == BASE_SLOT else home.pool_slot_of(s, e) for s, e in pairs]
    rows = RowMapping([Segment(slot, i, i + 1) for i, slot in enumerate(named)], CPU)
    y = torch.zeros(len(x), SHAPE[0])
    for pool in home.pools.values():
        pool.add_(y, x, rows)
    return y


def dense(made: Sequence[Term]) -> Tensor:
    return torch.stack([term.to_dense() for term in made]).sum(0)


@pytest.mark.parametrize("codec", ["blockdiag", "lowrank"])
def test_terms_of_all_experts_and_slots_are_in_one_pool(codec: str) -> None:
    home, matrices = experts()
    # Slot 2 has terms of two experts only, slot 3 of all.
    held = {2: (1, 4), 3: range(N_EXPERTS)}
    made = {(s, e): terms(10 * s + e, codec) for s, own in held.items() for e in own}
    for slot, own in held.items():
        put(slot, [matrices[e].stage(delta(matrices[e], made[slot, e])) for e in own])
    assert len(home.pools) == 1
    pairs = [(BASE_SLOT, 1), (2, 1), (2, 3), (2, 4), (3, 0), (3, 4)]
    x = random_matrix((len(pairs), SHAPE[1]), 99, 1.0)
    got = added(home, x, pairs)
    for i, pair in enumerate(pairs):
        own = dense(made[pair]) if pair in made else torch.zeros(SHAPE)
        torch.testing.assert_close(got[i], own @ x[i], rtol=1e-4, atol=1e-5)


def test_arrays_grow_once_for_all_experts() -> None:
    home, matrices = experts()
    parts = [m.stage(delta(m, terms(e, "blockdiag"))) for e, m in enumerate(matrices)]
    before = home.residency.version
    put(0, parts)
    assert home.residency.version == before + 1
    assert next(iter(home.pools.values())).capacity == N_EXPERTS


def test_hidden_slot_leaves_the_others_and_its_places_are_used_again() -> None:
    home, matrices = experts()
    for slot in (0, 1):
        put(slot, [m.stage(delta(m, terms(e, "blockdiag"))) for e, m in enumerate(matrices)])
    for matrix in matrices:
        matrix.hide(0)
    assert home.slots == {1}
    assert set(home.residency.eager) == {1}
    x = random_matrix((2, SHAPE[1]), 99, 1.0)
    got = added(home, x, [(0, 2), (1, 2)])
    assert not got[0].any()
    torch.testing.assert_close(got[1], dense(terms(2, "blockdiag")) @ x[1], rtol=1e-4, atol=1e-5)
    put(2, [m.stage(delta(m, terms(e, "blockdiag"))) for e, m in enumerate(matrices)])
    assert next(iter(home.pools.values())).capacity == 2 * N_EXPERTS
    for slot in (1, 2):
        for matrix in matrices:
            matrix.hide(slot)
    assert not home.pools


def test_rows_stored_exactly_are_a_whole_matrix() -> None:
    home, matrices = experts()
    exact = random_matrix(SHAPE, 7, 1.0)
    given = TensorDelta("w[3]", SHAPE, SHAPE, False, (), DenseRows(0, exact))
    put(0, [matrices[3].stage(given)])
    x = random_matrix((1, SHAPE[1]), 99, 1.0)
    want = (exact - random_matrix(SHAPE, 3)) @ x[0]
    torch.testing.assert_close(added(home, x, [(0, 3)])[0], want, rtol=1e-4, atol=1e-5)


def test_terms_of_a_turned_checkpoint_are_turned_round() -> None:
    """Those of an artifact that says so are in the server's orientation already."""
    home, matrices = experts(turned=True)
    stored = encode(
        make_encoder("blockdiag", bits=4), random_matrix((16, 24), 5), PARAMS["blockdiag"]
    )
    put(0, [matrices[1].stage(TensorDelta("w[1]", (16, 24), (16, 24), False, stored, None))])
    made = terms(6, "blockdiag")
    put(1, [matrices[1].stage(TensorDelta("w[1]", SHAPE, SHAPE, True, made, None))])
    x = random_matrix((2, SHAPE[1]), 99, 1.0)
    got = added(home, x, [(0, 1), (1, 1)])
    torch.testing.assert_close(got[0], dense(stored).T @ x[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], dense(made) @ x[1], rtol=1e-4, atol=1e-5)


def test_delta_of_another_shape_is_refused() -> None:
    for turned in (False, True):
        _, matrices = experts(turned=turned)
        with pytest.raises(WrongShape, match=r"w\[0\]"):
            matrices[0].stage(TensorDelta("w[0]", (3, 4), (3, 4), False, (), None))
        with pytest.raises(WrongShape, match="rows past the base's"):
            matrices[0].stage(TensorDelta("w[0]", (30, 16), SHAPE, False, (), None))
