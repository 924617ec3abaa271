"""The weights that a quantised base was made from, as what a fine-tune is compared with.

A difference from dequantised weights holds the base's rounding errors besides what was tuned; one
from the original weights does not. It is applied to the quantised base all the same, so the two
must be one model: that they are not is found here, by samples, before any work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import split_slice
from compressor.checkpoint.layout import Layout, read_layout
from compressor.checkpoint.pairing import Pairing, TensorPair, match_tensors
from compressor.checkpoint.quantised.index import DenseIndex
from compressor.checkpoint.settings import compare_configs
from compressor.errors import CheckpointError

OPTION = "--difference-from"
# Two roundings to bfloat16, and what float16 does to the smallest numbers.
_RELATIVE, _ABSOLUTE = 2.0**-7, 2.0**-14
_MATRICES = 6  # looked at, evenly spaced
_PIECES = 4  # of each
_PIECE_ELEMENTS = 1 << 14
_LEAST_COSINE = 0.7  # between weights and what 2 bits keep of them it is above .8
_MOST_SHARED = 0.25  # of the fine-tune's difference that lies in the base's own
_CERTAIN = 6.0  # standard errors


@dataclass(frozen=True, slots=True)
class _Trio:
    """The checkpoints, and the base's names of its tensors."""

    base: Checkpoint
    original: Checkpoint
    tuned: Checkpoint
    base_keys: dict[str, str]

    def stores_as_is(self, pair: TensorPair) -> bool:
        """Whether the base has rounded this tensor at most to another dtype."""
        tensors = self.base.tensors
        name, _ = split_slice(self.base_keys[pair.name])
        return isinstance(tensors, DenseIndex) and name not in tensors.forms

    def pieces(self, pair: TensorPair, n_pieces: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield rows of the base's, the original's and the fine-tune's, evenly spaced."""
        rows, *rest = self.original.tensors[pair.base_key].shape
        width = rest[0] if rest else 1
        step = min(rows, max(1, _PIECE_ELEMENTS // width))
        for start in {n * (rows - step) // max(1, n_pieces - 1) for n in range(n_pieces)}:
            yield tuple(
                checkpoint.read_rows(key, start, start + step).double()
                for checkpoint, key in (
                    (self.base, self.base_keys[pair.name]),
                    (self.original, pair.base_key),
                    (self.tuned, pair.tuned_key),
                )
            )

    def wrong(self, why: str) -> CheckpointError:
        return _wrong(self.base, self.original, why)


def pair_with_original(
    base: Checkpoint,
    original: Checkpoint,
    tuned: Checkpoint,
    ignore_config: Collection[str] = (),
) -> Pairing:
    """As `pair_tensors`, but what the fine-tune is compared with are the original's tensors.

    Raises CheckpointError if `base` is not `original`, stored otherwise.
    """
    changes = compare_configs(base, tuned, ignore_config)
    layout = read_layout(base.path)
    _check_layouts(base, layout, original, read_layout(original.path))
    pairing = match_tensors(original, tuned, changes)
    keys = layout.with_untied(pairing.untied).keys(base.tensors, base.name)
    trio = _Trio(base, original, tuned, keys)
    _check_vectors(trio, pairing)
    _check_matrices(trio, pairing)
    return pairing


def _check_layouts(base: Checkpoint, ours: Layout, original: Checkpoint, theirs: Layout) -> None:
    """Both have the same parameters, of the same shapes and tied alike."""
    first = {name: list(parameter.shape) for name, parameter in ours.parameters.items()}
    second = {name: list(parameter.shape) for name, parameter in theirs.parameters.items()}
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            sizes = f"shape {first.get(name, 'none')} in {base.name} and {second.get(name, 'none')}"
            raise _wrong(base, original, f"{name} has {sizes} in {original.name}")
    if differing := set(ours.tied) ^ set(theirs.tied):
        raise _wrong(base, original, f"only one of the two ties {min(differing)[0]}")


def _check_vectors(trio: _Trio, pairing: Pairing) -> None:
    """Norms and biases are not quantised."""
    for pair in pairing.pairs:
        if len(pair.base_shape) != 1 or pair.integral or not _has_rows(trio, pair):
            continue
        for ours, theirs, _ in trio.pieces(pair, 1):
            _check_equal(trio, pair, ours, theirs)


def _has_rows(trio: _Trio, pair: TensorPair) -> bool:
    return bool(trio.original.tensors[pair.base_key].shape)


def _check_equal(trio: _Trio, pair: TensorPair, ours: Tensor, theirs: Tensor) -> None:
    if torch.allclose(ours, theirs, rtol=_RELATIVE, atol=_ABSOLUTE):
        return
    what = f"{pair.name}, which the base does not store quantised, has other values there"
    if len(pair.base_shape) == 1:
        what += " (AWQ and SmoothQuant move scales from weights into norms, and no original fits)"
    raise trio.wrong(what)


def _check_matrices(trio: _Trio, pairing: Pairing) -> None:
    matrices = [pair for pair in pairing.pairs if pair.is_matrix]
    for pair in matrices[:: max(1, len(matrices) // _MATRICES)]:
        sums = _Sums()
        for ours, theirs, tuned in trio.pieces(pair, _PIECES):
            if trio.stores_as_is(pair):
                _check_equal(trio, pair, ours, theirs)
            cosine = torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
            if bool(theirs.any()) and float(cosine) < _LEAST_COSINE:
                raise trio.wrong(f"{pair.name} has other values there")
            sums.add(ours - theirs, tuned - theirs)
        if sums.is_tuned:
            raise trio.wrong(
                f"in {pair.name} the base differs from it in the direction of {trio.tuned.name}, "
                "which rounding errors do not"
            )


@dataclass(slots=True)
class _Sums:
    """Over sampled weights of a matrix; ``e`` is the base's error, ``d`` what was tuned.

    shared   sum of ``e d``
    chance   sum of ``(e d)^2``
    tuned    sum of ``d d``
    """

    shared: float = 0.0
    chance: float = 0.0
    tuned: float = 0.0

    def add(self, error: Tensor, difference: Tensor) -> None:
        product = error * difference
        self.shared += float(product.sum())
        self.chance += float(product.square().sum())
        self.tuned += float(difference.square().sum())

    @property
    def is_tuned(self) -> bool:
        """Whether the base has a part of what was tuned, more than by chance."""
        is_much = self.shared > _MOST_SHARED * self.tuned
        return is_much and self.shared > _CERTAIN * self.chance**0.5


def _wrong(base: Checkpoint, original: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{base.name} was not made from {original.name}: {why}; give {OPTION} the model that the "
        "base was quantised from, or leave it out"
    )
