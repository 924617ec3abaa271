"""What a variant will take of device memory, told by its artifact before it was ever loaded.

Codes of up to 8 bits stay packed; all other values are held in the served dtype. On the safe side:
a test compares it with what loads take.
"""

from __future__ import annotations

from math import prod
from typing import Any

from compressor.artifact.reader import DeltaConfig, TensorEntry, TermEntry
from compressor.errors import Corrupt

MARGIN = 1.15  # blocks that do not divide evenly, rows filled up to whole bytes
SCALE_BYTES = 4
INDEX_BYTES = 8


def expected_bytes(config: DeltaConfig, width: int) -> int:
    """Device bytes to reckon with. Raises Corrupt.

    width  bytes of one value of the served dtype
    """
    try:
        return round(MARGIN * sum(_of_entry(entry, width) for entry in config.tensors))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:  # a stranger's parameters
        raise Corrupt("delta_config.json: a term lacks a parameter of its codec") from error


def _of_entry(entry: TensorEntry, width: int) -> float:
    total = 0.0
    if entry.exact_row_start is not None:
        total += (entry.shape[0] - entry.exact_row_start) * prod(entry.shape[1:]) * width
    if entry.terms:
        m, n = entry.base_shape
        total += sum(_of_term(term, m, n, width) for term in entry.terms)
    return total


def _of_term(term: TermEntry, m: int, n: int, width: int) -> float:
    params: dict[str, Any] = dict(term.params)
    bits = int(params.get("bits", 16))
    value = width if bits > 8 else (4 if bits == 3 else bits) / 8
    if term.codec == "blockdiag":
        return m * n / float(params["n_blocks"]) * value + m * SCALE_BYTES
    if term.codec == "lowrank":
        return float(params["rank"]) * ((m + n) * value + 2 * SCALE_BYTES)
    if term.codec == "rows":
        return float(params["n_rows"]) * (n * value + SCALE_BYTES) + m * INDEX_BYTES
    kept = sum(float(params.get(key, 0)) for key in ("kept", "kept8", "kept3", "kept2"))
    blocks = (m + n) / float(params["block_rows"]) + 2
    return kept * ((m + n) * width + blocks * INDEX_BYTES)
