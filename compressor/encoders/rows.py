"""The encoder of `rows` terms: the rows of the largest norm."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.codecs.blockdiag import as_stored
from compressor.codecs.quantize import quantize_rows
from compressor.codecs.rows import SCALE_BITS, RowsTerm, rows_from_codes
from compressor.codecs.term import MatrixSource
from compressor.encoders.sources import finite_block
from compressor.encoders.svd import row_strips


def encode_largest_rows(name: str, source: MatrixSource, n_rows: int, bits: int) -> RowsTerm:
    """Encode the `n_rows` rows of the largest norm; of equal ones the first.

    Reads `source` twice. Raises UnsupportedTensor naming `name` if a value is not finite.
    """
    m, n = source.shape
    squares = torch.cat(
        [_read(name, source, *rows).double().square().sum(1) for rows in row_strips(m, n)]
    )
    chosen = squares.argsort(descending=True, stable=True)[:n_rows].sort().values.cpu()
    parts = []
    for start, end in row_strips(m, n):
        own = chosen[(chosen >= start) & (chosen < end)] - start
        if len(own):
            strip = _read(name, source, start, end)
            parts.append(strip[own.to(strip.device)].cpu())
    codes, scales = quantize_rows(torch.cat(parts), bits)
    stored, unit = as_stored(scales, SCALE_BITS)
    return rows_from_codes(source.shape, bits, chosen, codes, stored, unit)


def _read(name: str, source: MatrixSource, start: int, end: int) -> Tensor:
    return finite_block(name, source, start, end, 0, source.shape[1])
