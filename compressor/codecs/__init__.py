"""Codecs: the terms that one tensor's delta is stored as: how they are read, applied, made dense.

`term_class` finds the reader of a stored codec. What makes terms is in `compressor.encoders`.
"""

from __future__ import annotations

from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.impart import ImpartTerm
from compressor.codecs.impart_qt import ImpartQtTerm
from compressor.codecs.lowrank import LowRankTerm, lowrank_from_factors
from compressor.codecs.rows import RowsTerm
from compressor.codecs.term import (
    DenseRows,
    MatrixSource,
    Params,
    Shape,
    TensorDelta,
    Term,
)
from compressor.errors import UnsupportedVersion

__all__ = [
    "BlockDiagTerm",
    "DenseRows",
    "ImpartQtTerm",
    "ImpartTerm",
    "LowRankTerm",
    "MatrixSource",
    "Params",
    "RowsTerm",
    "Shape",
    "TensorDelta",
    "Term",
    "lowrank_from_factors",
    "term_class",
]


def term_class(codec: str) -> type[Term]:
    """Return the class that reads terms stored by `codec`; unknown: UnsupportedVersion."""
    match codec:
        case BlockDiagTerm.codec:
            return BlockDiagTerm
        case ImpartTerm.codec:
            return ImpartTerm
        case ImpartQtTerm.codec:
            return ImpartQtTerm
        case LowRankTerm.codec:
            return LowRankTerm
        case RowsTerm.codec:
            return RowsTerm
        case _:
            raise UnsupportedVersion(
                f"codec {codec!r:.40} is unknown to this version; upgrade impart-serve"
            )
