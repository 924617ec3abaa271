"""Products of any number of rows and outputs with packed codes, made of `piece_product`'s."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from server.ops.cpu.codegen.piece_product import (
    FLOAT_BYTES,
    MOST_SUMS,
    PAIR_BYTES,
    make_piece_product,
)
from server.ops.cpu.codegen.vectors import LANES

BITS = (2, 3, 4, 8)  # that codes may have


def _any_rows(bits: int, vectors: int, item: int) -> Any:
    four, two, one = (make_piece_product(bits, vectors, rows, item) for rows in (4, 2, 1))
    # More sums than fit the registers would cost more than unpacking the codes twice.
    fits = item == PAIR_BYTES and 8 * vectors <= MOST_SUMS
    eight = make_piece_product(bits, vectors, 8, item) if fits else None

    @njit(inline="always")
    def product(
        codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
    ):
        t = np.int64(0)
        while t < n_rows:
            left, to, own = n_rows - t, sums + t * sums_step, x + t * x_step
            if eight is not None and left >= 8:
                eight(codes, mb, nb, own, x_step, to, sums_step, count, scales, kind, unit, ahead)
                t += 8
            elif left >= 4:
                four(codes, mb, nb, own, x_step, to, sums_step, count, scales, kind, unit, ahead)
                t += 4
            elif left >= 2:
                two(codes, mb, nb, own, x_step, to, sums_step, count, scales, kind, unit, ahead)
                t += 2
            else:
                one(codes, mb, nb, own, x_step, to, sums_step, count, scales, kind, unit, ahead)
                t += 1

    return product


def _any_count(bits: int, item: int) -> Any:
    """``add_piece`` of one number of bits, see `piece_product_of`."""
    one = _any_rows(bits, 1, item)
    if item == FLOAT_BYTES:  # more outputs at once would not fit the registers of AVX2

        @njit
        def add_narrow(
            codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
        ):
            for i in range(0, count, LANES):
                n, at_scale = min(count - i, np.int64(LANES)), scales + min(kind + 1, 2) * i
                to = sums + 4 * i
                one(
                    codes + i, mb, nb, x, x_step, to, sums_step, n, at_scale, kind, unit, ahead,
                    n_rows,
                )  # fmt: skip

        return add_narrow
    two, three = _any_rows(bits, 2, item), _any_rows(bits, 3, item)

    @njit
    def add_piece(
        codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
    ):
        if count > 32 and n_rows < 8:
            three(
                codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
            )
            return
        if count > 16:
            n = min(count, 32)
            two(codes, mb, nb, x, x_step, sums, sums_step, n, scales, kind, unit, ahead, n_rows)
            codes, sums, scales = codes + n, sums + 4 * n, scales + min(kind + 1, 2) * n
            count -= n
        if count > 0:
            one(codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows)

    return add_piece


def piece_product_of(item: int) -> Any:
    """``add_piece`` for inputs of bfloat16 (`PAIR_BYTES`) or float32 (`FLOAT_BYTES`)."""
    by_two, by_three, by_four, by_eight = (_any_count(bits, item) for bits in BITS)

    @njit(inline="always")
    def add_piece(
        bits, codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
    ):
        """``sums[r, i] += scale[i] * unit * sum_j value(code[j, i]) x[r, j]``.

        bits    of a code, one of `BITS`
        codes   address of the first output's; byte rows are `mb` apart; nb inputs
        x       address of the first row's inputs, rows `x_step` bytes apart; zero, or never read,
                where a byte row's fields go past the inputs
        sums    address of the first, float32, rows `sums_step` bytes apart; up to 15 behind the
                last are read, and written as they were
        count   outputs, at most 48
        scales  address of the first, if the `kind` has any: `OCTAVES` (one byte each, see
                `server.ops.packed`) or `HALF_SCALES` (float16)
        ahead   bytes from these codes to what is wanted next: it comes into the cache meanwhile
        """
        if bits == 4:
            by_four(
                codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
            )
        elif bits == 2:
            by_two(
                codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
            )
        elif bits == 3:
            by_three(
                codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
            )
        else:
            by_eight(
                codes, mb, nb, x, x_step, sums, sums_step, count, scales, kind, unit, ahead, n_rows
            )

    return add_piece


add_piece_to_pairs, add_piece_to_floats = map(piece_product_of, (PAIR_BYTES, FLOAT_BYTES))
