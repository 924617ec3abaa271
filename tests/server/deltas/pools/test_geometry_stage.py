"""What a pool stages: the bytes of the artifact as they are, or packed to the same."""

from __future__ import annotations

import pytest
import torch

from compressor.codecs import LowRankTerm, RowsTerm, Term, lowrank_from_factors
from compressor.encoders.blockdiag import encode_blocks
from compressor.encoders.rows import encode_largest_rows
from compressor.encoders.sources import TensorSource
from server.deltas.pools.base import TermPool
from server.deltas.pools.geometry import geometry_of, make_pool
from server.deltas.pools.rows import ROWS_STEP
from server.ops.kernels import TorchKernels
from tests.compressor.codec_oracles import as_stream, random_matrix

CPU = torch.device("cpu")
# b is packed along its components, of which these have fewer than their pool.
REPACKED = ("lowrank 4 filled up", "lowrank 8 filled up")
PACKING = ("pack_columns", "unpack_columns", "pack_bits", "unpack_bits")


def pool_of(term: Term) -> TermPool:
    return make_pool(geometry_of(term), term.shape, torch.float32, CPU, TorchKernels())


def lowrank(rank: int, bits: int) -> LowRankTerm:
    return lowrank_from_factors(random_matrix((rank, 48)), random_matrix((rank, 64), 1), bits)


def rows(n_rows: int, bits: int) -> RowsTerm:
    return encode_largest_rows("w", TensorSource(random_matrix((150, 48))), n_rows, bits)


def terms() -> dict[str, Term]:
    """In kernel order, and what of them their pool takes as it is."""
    blocks = TensorSource(random_matrix((64, 48)))
    made: dict[str, Term] = {}
    for bits in (2, 4, 8):
        for scale_bits in (8, 16):
            made[f"blockdiag {bits} {scale_bits}"] = encode_blocks("w", blocks, 4, bits, scale_bits)
        made[f"lowrank {bits}"] = lowrank(8, bits)
        made[f"rows {bits}"] = rows(ROWS_STEP, bits)
        made[f"rows {bits} filled up"] = rows(ROWS_STEP + 5, bits)
    made["rows all"] = rows(150, 2)
    made["lowrank 8 filled up"] = lowrank(5, 8)
    made["lowrank 4 filled up"] = lowrank(6, 4)
    return made


@pytest.mark.parametrize("name", terms())
def test_stage_of_either_order_gives_identical_arrays(name: str) -> None:
    term = terms()[name]
    pool, stream = pool_of(term), as_stream(term)
    assert geometry_of(stream) == geometry_of(term)
    for one, other in zip(pool.stage(term), pool.stage(stream), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
        assert one.is_contiguous()


@pytest.mark.parametrize("name", [name for name in terms() if not name.endswith("filled up")])
def test_stage_of_kernel_order_hands_on_the_artifacts_own_bytes(name: str) -> None:
    term = terms()[name]
    staged = {part.data_ptr() for part in pool_of(term).stage(term)}
    codes = term.tensors().keys() & {"codes", "a", "b"}
    assert codes
    assert {term.tensors()[part].data_ptr() for part in codes} <= staged


@pytest.mark.parametrize("name", [name for name in terms() if name not in REPACKED])
def test_stage_of_kernel_order_packs_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a pool's arrays have rows to fill up."""
    term = terms()[name]

    def refuse(*_: object) -> None:
        raise AssertionError("packed")

    for module in ("blockdiag", "rows", "lowrank"):
        for function in PACKING:
            for package in ("compressor.codecs", "server.deltas.pools"):
                monkeypatch.setattr(f"{package}.{module}.{function}", refuse, raising=False)
    pool_of(term).stage(term)
    with pytest.raises(AssertionError, match="packed"):
        pool_of(term).stage(as_stream(term))


def test_stage_of_more_components_than_stored_pads_a_and_repacks_b() -> None:
    term = lowrank(6, 4)
    assert term.in_columns("a")
    assert term.in_columns("b")
    down, _, _, up, _ = pool_of(term).stage(term)
    assert torch.equal(down[:, :6], term.stored["a"])
    assert not down[:, 6:].any()
    assert up.shape == (4, 64)
