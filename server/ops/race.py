"""Random draws as a race: every id has an exponential clock, and the first to ring is drawn.

An id of probability p whose clock shows E / p, with E exponential, rings first with probability p
(the same as adding Gumbel noise to its log probability). Each E is a hash of the row's key and the
id: there is no state, rows do not depend on each other, an id's noise does not depend on how many
ids there are, and every device computes the same noise (a logarithm's last bit aside). A small
change of the probabilities moves every clock a little, so that the winner mostly stays; with the
inverse of the cumulated distribution it moves the border of every id that follows.

On a device only whole-tensor operations of fixed shapes: nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_IN_CACHE = 8  # at once on a CPU: what a row needs in between stays in its cache

_MASK_64 = (1 << 64) - 1
_INT32 = 1 << 32


def row_key(seed: int, position: int) -> tuple[int, int]:
    """Two int32 that are as good as random for every pair of a seed and a position.

    Any integers may be given; seeds count by their lowest 64 bits.
    """
    mixed = _mixed_64(_mixed_64(seed & _MASK_64) + position)
    low, high = mixed % _INT32, mixed >> 32
    return _signed(low), _signed(high | 1)  # the second is a factor: odd ones lose no bit


def token_hashes(n_ids: int, device: torch.device) -> Tensor:
    """int32 [n_ids]: the part of the noise that depends on the id alone."""
    ids = torch.arange(1, n_ids + 1, dtype=torch.int32, device=device)
    return _mixed_(_mixed_(ids))


def race(scores: Tensor, keys: Tensor, hashes: Tensor) -> Tensor:
    """Draw one id for each row, at least one, with the probabilities of its softmax.

    scores  float32 [R, V], log probabilities up to a constant; -inf is never drawn
    keys    int32 [R, 2], made of `row_key`
    hashes  int32 [V], `token_hashes`
    returns int64 [R]; of a row that has no finite score, any id
    """
    if scores.device.type != "cpu":
        return (scores - exponentials(keys, hashes).log_()).argmax(-1)
    drawn = []
    for first in range(0, len(scores), ROWS_IN_CACHE):
        rows = slice(first, first + ROWS_IN_CACHE)
        clocks = scores[rows] - exponentials(keys[rows], hashes).log_()
        drawn.append(torch.from_numpy(clocks.numpy().argmax(-1)))  # vectorised, torch's is not
    return torch.cat(drawn)


def exponentials(keys: Tensor, hashes: Tensor) -> Tensor:
    """float32 [R, V], exponentially distributed with mean 1, each in (0, 17)."""
    words = hashes ^ keys[:, :1]
    words *= keys[:, 1:]
    words = _mixed_(words)
    words &= 0x7FFFFFFF
    # Minus a number in (0, 1), exact to 24 bits however small: the smallest decide the race.
    negative = words.float().mul_(-(2.0**-31) * (1 - 2.0**-23)).sub_(2.0**-33)
    return negative.log1p_().neg_()


def _mixed_(words: Tensor) -> Tensor:
    """Hash int32 in place; overflow wraps around, and shifts are made to fill up with zeros."""
    shifted = words >> 15
    shifted &= 0x1FFFF
    words ^= shifted
    words *= 0x2C1B3C6D
    torch.bitwise_right_shift(words, 12, out=shifted)
    shifted &= 0xFFFFF
    words ^= shifted
    return words


def _mixed_64(value: int) -> int:
    """One step of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _signed(word: int) -> int:
    return word - _INT32 if word >= 1 << 31 else word
