"""Packed blocks made from codec terms, and guards around what kernels may write."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.codecs.blockdiag import BlockDiagTerm, blockdiag_from_codes
from compressor.codecs.columns import pack_columns, packed_rows
from compressor.codecs.quantize import to_half
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import BASE_SLOT, Segment

CPU = torch.device("cpu")
CANARY = 12345.0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_term(shape: tuple[int, int], n_blocks: int, bits: int, seed: int) -> BlockDiagTerm:
    """A term with every code value; scales as they come back from disk (float16 times unit)."""
    m, n = shape
    rows = [m // n_blocks + (b < m % n_blocks) for b in range(n_blocks)]
    cols = [n // n_blocks + (b < n % n_blocks) for b in range(n_blocks)]
    count = sum(r * c for r, c in zip(rows, cols, strict=True))
    unit = 2.0**-12
    if bits == 16:
        values = torch.randn(count, generator=generator(seed)).half()
        return blockdiag_from_codes(shape, n_blocks, 16, values, torch.full((m,), unit), unit)
    codes = torch.randint(0, 1 << bits, (count,), generator=generator(seed), dtype=torch.uint8)
    scales = (torch.rand(m, generator=generator(seed + 1)) + 0.5) * 2.0**-3
    scales = to_half(scales, unit).float() * unit
    return blockdiag_from_codes(shape, n_blocks, bits, codes, scales, unit)


def pack(variants: dict[int, list[BlockDiagTerm]], n_slots: int) -> tuple[PackedBlocks, Tensor]:
    """Element by element from the terms, and which slots are present; others hold garbage, NaN."""
    first = next(iter(variants.values()))
    s, bits, n = first[0].n_blocks, first[0].bits, first[0].shape[1]
    sizes = tuple(term.shape[0] for term in first)
    nb, width = -(-n // s), sum(-(-m // s) for m in sizes)
    nan = float("nan")
    if bits == 16:
        codes = torch.full((n_slots, s, nb, width), nan, dtype=torch.float16)
    else:
        codes = torch.full((n_slots, s, packed_rows(nb, bits), width), 0xA5, dtype=torch.uint8)
    scales = torch.full((n_slots, s, width), nan, dtype=torch.float16)
    units = torch.full((n_slots, len(sizes)), nan)
    blocks = PackedBlocks(codes, scales, units, sizes, n, bits)
    for slot, terms in variants.items():
        place = 0
        for g, term in enumerate(terms):
            mb = -(-term.shape[0] // s)
            values, scale = _padded(term, mb, nb)
            values = values if bits == 16 else pack_columns(values.to(torch.uint8), bits)
            codes[slot, :, :, place : place + mb] = values
            scales[slot, :, place : place + mb] = scale
            units[slot, g] = term.unit
            place += mb
    present = torch.zeros(n_slots, dtype=torch.int32)
    for slot in variants:
        present[slot] = slot + 1
    return blocks, present


def _padded(term: BlockDiagTerm, mb: int, nb: int) -> tuple[Tensor, Tensor]:
    """[s, nb, mb] codes (or 16-bit values) and [s, mb] scales in units, by loops over elements."""
    (m, n), s = term.shape, term.n_blocks
    values, scales = torch.zeros(s, nb, mb, dtype=torch.float16), torch.zeros(s, mb)
    at = row = 0
    codes = term.codes
    for block in range(s):
        for i in range(m // s + (block < m % s)):
            width = n // s + (block < n % s)
            values[block, :width, i] = codes[at : at + width].half()
            scales[block, i] = term.scales[row] / term.unit
            at, row = at + width, row + 1
    return values, scales.half()


def segments_of(counts: list[tuple[int, int]]) -> list[Segment]:
    """(slot, rows) in batch order."""
    segments, end = [], 0
    for slot, n in counts:
        segments.append(Segment(slot, end, end + n))
        end += n
    return segments


def expected(y: Tensor, x: Tensor, segments: list[Segment], dense: dict[int, Tensor]) -> Tensor:
    """float64 ``y + x dW^T`` with each row's own dense matrix."""
    out = y.double()
    for segment in segments:
        if segment.slot != BASE_SLOT and segment.slot in dense:
            part = slice(segment.start, segment.end)
            out[part] += x[part].double() @ dense[segment.slot].double().T
    return out


def guarded(rows: int, columns: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A view [rows, columns] inside a larger array of canaries, and that array."""
    whole = torch.full((rows + 4, columns + 7), CANARY, dtype=dtype)
    view = whole[2 : 2 + rows, 3 : 3 + columns]
    view.copy_(torch.randn(rows, columns, generator=generator(seed)))
    return view, whole


def assert_guard_intact(whole: Tensor, rows: int, columns: int) -> None:
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[2 : 2 + rows, 3 : 3 + columns] = False
    assert bool((whole[outside] == CANARY).all())
