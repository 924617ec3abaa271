"""Parametrisations over several axes of which the default suite takes a few combinations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def corners(*axes: Sequence[Any], rounds: int = 1) -> list[Any]:
    """Every combination; slow, but for some in which every value of every axis stands.

    A value that is a tuple stands for several arguments.

    rounds  of the longest axis, each with other partners
    """
    length = max(map(len, axes))
    fast = {
        tuple((i + turn * k) % len(axis) for k, axis in enumerate(axes))
        for turn in range(rounds)
        for i in range(length)
    }
    params = []
    for places in product(*(range(len(axis)) for axis in axes)):
        chosen = [axis[place] for axis, place in zip(axes, places, strict=True)]
        flat = [part for one in chosen for part in (one if isinstance(one, tuple) else (one,))]
        params.append(pytest.param(*flat, marks=[] if places in fast else pytest.mark.slow))
    return params
