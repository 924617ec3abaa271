"""Encoder of `blockdiag`: chooses the number of blocks, reads only them, quantises.

A matrix may have a low-rank head beside its blocks, or instead of them: then some rows can be kept
whole (`compressor.codecs.rows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.codecs.blockdiag import (
    BLOCKDIAG_BITS,
    SCALE_BITS,
    BlockDiagTerm,
    as_stored,
    blockdiag_from_codes,
)
from compressor.codecs.lowrank import LOWRANK_BITS, LowRankTerm, lowrank_from_factors, lowrank_size
from compressor.codecs.packing import packed_size
from compressor.codecs.partition import Band, bands, kept_values
from compressor.codecs.quantize import quantize_rows, to_half, unit_for
from compressor.codecs.rows import RowsTerm, rows_size
from compressor.codecs.term import MatrixSource, Params, Shape, Term
from compressor.encoders.rows import encode_largest_rows
from compressor.encoders.sources import Residual, finite_block
from compressor.encoders.svd import factors
from compressor.errors import InputError

ROW_BITS = 2  # of rows kept whole

_BATCH = 1 << 20  # values read and quantised at once


@dataclass(frozen=True, slots=True)
class BlockDiagCodec:
    """Options of the codec.

    bits           2, 3, 4, 8 or 16 a value
    scale_bits     8 or 16 a row's scale; half a step of 8 is 2.2 %, which costs less than the
                   second byte does where rows of a block are short
    head_fraction  share of the bytes for a dense low-rank head; 0 for none (and then no
                   decomposition, and only the diagonal blocks are read)
    head_bits      bits of the head's values: 2, 3, 4, 8, 16
    divisor_slack  prefer a number of blocks that divides both sides (serving is faster then)
                   if one lies within this share of what the budget asks for; 0 to forgo
    """

    name: ClassVar[str] = "blockdiag"
    bits: int = 4
    scale_bits: int = 8
    head_fraction: float = 0.0
    head_bits: int = 4
    divisor_slack: float = 0.25

    def __post_init__(self) -> None:
        if self.bits not in BLOCKDIAG_BITS:
            raise InputError(
                f"blockdiag: bits must be one of {list(BLOCKDIAG_BITS)}, got {self.bits}"
            )
        if self.scale_bits not in SCALE_BITS:
            raise InputError(
                f"blockdiag: scale_bits must be one of {list(SCALE_BITS)}, got {self.scale_bits}"
            )
        if not 0 <= self.head_fraction < 1:
            raise InputError(
                f"blockdiag: head_fraction must be within [0, 1), got {self.head_fraction}"
            )
        if self.head_bits not in LOWRANK_BITS[:-1]:
            raise InputError(
                f"blockdiag: head_bits must be one of {list(LOWRANK_BITS[:-1])}, "
                f"got {self.head_bits}"
            )
        if not 0 <= self.divisor_slack < 1:
            raise InputError(
                f"blockdiag: divisor_slack must be within [0, 1), got {self.divisor_slack}"
            )

    def options(self) -> Params:
        """Resolved options, JSON-able."""
        return asdict(self)

    @property
    def joins_siblings(self) -> bool:
        """Equal numbers of blocks let a server apply siblings in one product."""
        return True

    def fit(self, shape: Shape, budget_bytes: float) -> Params:
        """Return the setting whose size is nearest `budget_bytes`."""
        (params,) = self.fit_siblings((shape,), budget_bytes)
        return params

    def fit_siblings(self, shapes: Sequence[Shape], budget_bytes: float) -> tuple[Params, ...]:
        """Return settings for all of `shapes` together, nearest `budget_bytes`.

        Heads share the bytes by elements; the number of blocks is the same for all.
        """
        n_elements = sum(m * n for m, n in shapes)
        ranks = [self._head_rank(shape, budget_bytes / n_elements) for shape in shapes]
        heads = [lowrank_size(s, r, self.head_bits) for s, r in zip(shapes, ranks, strict=True)]
        n_blocks = self._choose_blocks(shapes, budget_bytes - sum(heads))
        return tuple(self.settings(rank, n_blocks) for rank in ranks)

    def settings(self, head_rank: int, n_blocks: int, n_rows: int = 0) -> Params:
        """Return the parameters of one matrix; 16-bit values have no scales.

        n_rows  kept whole of what the head leaves, where there are no blocks
        """
        head: Params = {"head_rank": head_rank, "head_bits": self.head_bits} if head_rank else {}
        if not n_blocks:
            assert head_rank or n_rows
            return head | ({"n_rows": n_rows, "row_bits": ROW_BITS} if n_rows else {})
        assert not n_rows
        scale_bits = 16 if self.bits == 16 else self.scale_bits
        params: Params = {"bits": self.bits}
        params |= {"scale_bits": scale_bits} if scale_bits != 16 else {}
        return params | head | {"n_blocks": n_blocks}

    def probes(self, shape: Shape) -> tuple[Params, ...]:
        """A head and blocks, which single matrices may have without `head_fraction`; rows."""
        del shape
        return self.settings(1, 2), self.settings(0, 0, n_rows=2)

    def terms_of(self, params: Params) -> tuple[str, ...]:
        """Blocks or rows or neither, behind the head if there is one."""
        kinds = {
            "head_rank": LowRankTerm.codec,
            "n_rows": RowsTerm.codec,
            "n_blocks": BlockDiagTerm.codec,
        }
        return tuple(codec for key, codec in kinds.items() if params.get(key))

    def _head_rank(self, shape: Shape, bytes_per_element: float) -> int:
        m, n = shape
        per_component = lowrank_size(shape, 8, self.head_bits) / 8
        wanted = self.head_fraction * bytes_per_element * m * n / per_component
        return min(round(wanted), min(shape) // 2)

    def size_bytes(self, shape: Shape, params: Params) -> int:
        """Exact payload bytes."""
        size = 0
        if params.get("n_blocks"):
            form = (params["n_blocks"], params["bits"], params.get("scale_bits", 16))
            size += blocks_size(shape, *form)
        if params.get("head_rank"):
            size += lowrank_size(shape, params["head_rank"], params["head_bits"])
        if params.get("n_rows"):
            size += rows_size(shape, params["n_rows"], params["row_bits"])
        return size

    def encode(
        self, name: str, source: MatrixSource, params: Params, seed: int
    ) -> tuple[Term, ...]:
        """Return the terms of `terms_of`.

        seed is not used: nothing here is random.
        """
        del seed
        terms: tuple[Term, ...] = ()
        if params.get("head_rank"):
            a, b = factors(name, source, params["head_rank"])
            head: LowRankTerm = lowrank_from_factors(a, b, params["head_bits"])
            terms, source = (head,), Residual(source, head)
        if params.get("n_rows"):
            terms += (encode_largest_rows(name, source, params["n_rows"], params["row_bits"]),)
        if params.get("n_blocks"):
            form = (params["n_blocks"], params["bits"], params.get("scale_bits", 16))
            terms += (encode_blocks(name, source, *form),)
        return terms

    def _choose_blocks(self, shapes: Sequence[Shape], budget_bytes: float) -> int:
        """Blocks per matrix, as many for each of `shapes`."""
        most = min(min(shape) for shape in shapes)
        fixed = 0 if self.bits == 16 else sum(m * self.scale_bits // 8 for m, _ in shapes)
        values = (budget_bytes - fixed) * 8 / self.bits
        ideal = sum(m * n for m, n in shapes) / values if values > 0 else float(most)
        ideal = min(max(ideal, 1.0), float(most))
        slack = 1 - self.divisor_slack
        common = math.gcd(*(side for shape in shapes for side in shape))
        friendly = [
            s
            for s in range(int(ideal * slack), int(ideal / slack) + 2)
            if s >= 1 and ideal * slack < s < ideal / slack and common % s == 0
        ]
        nearby = range(max(1, int(ideal) - 2), min(most, int(ideal) + 3) + 1)

        def distance(s: int) -> float:
            size = sum(blocks_size(shape, s, self.bits, self.scale_bits) for shape in shapes)
            return abs(size - budget_bytes)

        return min(friendly or nearby, key=distance)


def encode_blocks(
    name: str, source: MatrixSource, n_blocks: int, bits: int, scale_bits: int = 8
) -> BlockDiagTerm:
    """Encode the diagonal blocks of `source`, reading nothing else (twice for 16 bits).

    Raises UnsupportedTensor naming `name` if a value read is not finite.
    """
    if bits == 16:
        return _encode_halves(name, source, n_blocks)
    shape = source.shape
    codes = torch.empty(kept_values(shape, n_blocks), dtype=torch.uint8)
    scales = torch.empty(shape[0], dtype=torch.float32)
    row = code = 0
    for values, rescale in _batches(name, source, n_blocks):
        rows = values.shape[0]
        part, part_scales = quantize_rows(values, bits)
        codes[code : code + part.numel()] = part.view(-1)
        scales[row : row + rows] = part_scales * rescale
        row += rows
        code += part.numel()
    stored, unit = as_stored(scales, scale_bits)
    return blockdiag_from_codes(shape, n_blocks, bits, codes, stored, unit, scale_bits)


def _encode_halves(name: str, source: MatrixSource, n_blocks: int) -> BlockDiagTerm:
    """16 bits: one pass for the unit, one for the values, so that memory stays small."""
    shape = source.shape
    largest = torch.zeros(1)
    for values, rescale in _batches(name, source, n_blocks):
        largest = torch.maximum(largest, values.abs().max() * rescale)
    unit = unit_for(largest)
    halves = torch.empty(kept_values(shape, n_blocks), dtype=torch.float16)
    start = 0
    for values, rescale in _batches(name, source, n_blocks):
        halves[start : start + values.numel()] = to_half(values * rescale, unit).view(-1)
        start += values.numel()
    scales = torch.full((shape[0],), unit, dtype=torch.float32)
    return blockdiag_from_codes(shape, n_blocks, 16, halves, scales, unit)


def _batches(name: str, source: MatrixSource, n_blocks: int) -> Iterator[tuple[Tensor, float]]:
    """Yield the kept values as ``[rows, n_b]``, in row order, with their rescale ``n / n_b``."""
    for band in bands(source.shape, n_blocks):
        rescale = source.shape[1] / band.cols
        together = max(1, _BATCH // (band.rows * band.cols))
        for block in range(0, band.count, together):
            end = min(block + together, band.count)
            for values in _strips(name, source, band, block, end):
                yield values, rescale


def _strips(name: str, source: MatrixSource, band: Band, block: int, end: int) -> Iterator[Tensor]:
    """Several small blocks at once, or one large block a few rows at a time."""
    step = max(1, _BATCH // band.cols)
    if end - block > 1:
        parts = [_read(name, source, band, index, 0, band.rows) for index in range(block, end)]
        yield torch.cat(parts)
        return
    for start in range(0, band.rows, step):
        yield _read(name, source, band, block, start, min(start + step, band.rows))


def _read(name: str, source: MatrixSource, band: Band, block: int, start: int, end: int) -> Tensor:
    row, col = band.row + block * band.rows, band.col + block * band.cols
    return finite_block(name, source, row + start, row + end, col, col + band.cols)


def blocks_size(shape: Shape, n_blocks: int, bits: int, scale_bits: int) -> int:
    """Payload bytes of a `BlockDiagTerm`."""
    n_values = kept_values(shape, n_blocks)
    return packed_size(n_values, bits) + (0 if bits == 16 else shape[0] * scale_bits // 8)
