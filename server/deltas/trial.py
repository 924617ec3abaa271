"""Terms that have been decoded, tried once before their variant is first served.

A few random rows go through the pool, the product and the kernel that will serve them, against the
codec's own reference in float32: for every form of terms that the variant has, of one parameter.
The pool is one that nobody else knows of, with one place and a row mapping of its own, so that
steps may run meanwhile; on a GPU on a stream of its own.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from compressor.codecs.term import TensorDelta, Term
from server.deltas.failures import TermsDiffer
from server.deltas.parameter import DeltaParameter, PoolKey, StagedParameter
from server.deltas.pools.base import PoolParts, TermPool
from server.ops.joined import Joined
from server.ops.linear import TorchLinear
from server.ops.row_mapping import BASE_SLOT, RowMapping, Segment

SLOT = 0
ROWS = (Segment(BASE_SLOT, 0, 1), Segment(SLOT, 1, 4))  # the base's row must stay as it is
# Of the largest value. Sums of many products come in another order, and bfloat16 is rounded twice.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.04, torch.float16: 0.01}


class VariantTrial:
    """The terms of one variant. Of those of one form, which the same kernel reads in the same way
    (there are dozens of layers, and thousands of experts), the first are tried.
    """

    def __init__(self) -> None:
        self._tried: set[object] = set()

    def __call__(self, delta: TensorDelta, staged: StagedParameter) -> None:
        """Raises TermsDiffer; see `try_terms`."""
        parameter = staged.parameter
        use = parameter.home is parameter, parameter.is_multiplied, parameter.is_looked_up
        forms = {(parameter.shape, parameter.dtype, *use, key) for key, _ in staged.terms}
        if not forms <= self._tried:
            try_terms(delta, staged)
            self._tried |= forms


class _Zeros(TorchLinear):
    """A product that leaves nothing but the terms."""

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_zeros((len(x), self._weight.shape[0]))


@torch.inference_mode()
def try_terms(delta: TensorDelta, staged: StagedParameter) -> None:
    """Raises TermsDiffer if the fast path of one of the terms gives something else than the codec.

    What stands in for the terms is made by torch, and is not tried.
    """
    if staged.is_dense or len(staged.terms) != len(delta.terms):
        return
    parameter = staged.parameter
    with _beside_steps(parameter.device), parameter.kernels.alone():
        for term, (key, parts) in zip(delta.terms, staged.terms, strict=True):
            pool = _pool_of_one(parameter, key, parts)
            if parameter.is_multiplied:
                _compare(parameter.name, term, *_product(pool, term, parameter.dtype))
            if parameter.is_looked_up:
                _compare(parameter.name, term, *_look_up(pool, term, parameter.dtype))


def _pool_of_one(parameter: DeltaParameter, key: PoolKey, parts: PoolParts) -> TermPool:
    """A pool that has these parts at its only place, shown."""
    pool = parameter.new_pool(key)
    pool.map_slots(torch.zeros(1, dtype=torch.int32, device=parameter.device))
    if parameter.joins:  # a product of its own does what the parameter's would
        m, n = parameter.shape
        nothing = _Zeros(torch.empty((m, n), device="meta"))
        terms = parameter.kernels.joined_terms(nothing, m, parameter.dtype)
        pool.join([] if terms is None else [Joined(terms, 0)])
    place = pool.places.reserve(SLOT)
    arrays = pool.grown_arrays(parts, place)
    for array, part in zip(arrays, parts, strict=True):
        array[place].copy_(part)
    pool.adopt(arrays)
    pool.show(SLOT)
    return pool


def _product(pool: TermPool, term: Term, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the pool adds, and what the codec says."""
    m, n = term.shape
    rows = RowMapping(ROWS, pool.device)
    x = torch.randn((rows.n_rows, n), generator=_generator()).to(dtype)
    if pool.joins:
        y = pool.joins[0].terms.product(x.to(pool.device), rows)
    else:
        y = torch.zeros((rows.n_rows, m), dtype=dtype, device=pool.device)
        pool.add_(y, x.to(pool.device), rows)
    return y, _of_slot(term.apply(x.float()))


def _look_up(pool: TermPool, term: Term, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `_product`, of rows that are looked up."""
    m, n = term.shape
    rows = RowMapping(ROWS, pool.device)
    ids = torch.randint(m, (rows.n_rows,), generator=_generator())
    y = torch.zeros((rows.n_rows, n), dtype=dtype, device=pool.device)
    pool.add_rows_(y, ids.to(pool.device), rows)
    return y, _of_slot(term.dense_rows(ids))


def _of_slot(wanted: Tensor) -> Tensor:
    """Zeros where the row is not the slot's."""
    wanted[: ROWS[0].end] = 0
    return wanted


def _compare(name: str, term: Term, ours: Tensor, wanted: Tensor) -> None:
    largest = float(wanted.abs().max())
    off = float((ours.cpu().float() - wanted).abs().max())
    if not off <= TOLERANCE[ours.dtype] * largest:  # NaN too
        raise TermsDiffer(
            f"{name}: its {term.codec} terms give other values on this device than they should "
            f"({off:.2g} off where the largest is {largest:.2g})"
        )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _beside_steps(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The steps' stream neither waits for what runs here nor is waited for."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return _OwnStream(device)


class _OwnStream(contextlib.ExitStack):
    """A stream that has finished when this is left."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.callback(self._stream.synchronize)
        self.enter_context(torch.cuda.stream(self._stream))
