"""Faults that are known and not mended yet, each with the reason.

`test_matrix.py` fails for a fault that is not here, and for one here that is mended: take it out.
"""

from __future__ import annotations

KNOWN: dict[tuple[str, str], str] = {}
