"""The weights that a quantised base was made from, as what a fine-tune is compared with.

A difference from dequantised weights holds the base's rounding errors besides what was tuned; one
from the original weights does not. It is applied to the quantised base all the same, so the two
must be one model: that they are not is found here, by samples, before any work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folded import Scales, explained, matrix_scales, vector_scales
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
_AS_IS = "{}, which the base does not store quantised, has other values there"


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
        """Yield rows of the base's, and of the original's and the fine-tune's as the base scales
        them; evenly spaced.
        """
        rows, *rest = self.original.tensors[pair.base_key].shape
        width = rest[0] if rest else 1
        step = min(rows, max(1, _PIECE_ELEMENTS // width))
        for start in {n * (rows - step) // max(1, n_pieces - 1) for n in range(n_pieces)}:
            ours = self.base.read_rows(self.base_keys[pair.name], start, start + step)
            others = (
                checkpoint.read_rows(key, start, start + step).float()
                for checkpoint, key in (
                    (self.original, pair.base_key),
                    (self.tuned, pair.tuned_key),
                )
            )
            if pair.scales is not None and pair.is_matrix:
                where = (start, start + step, 0, width)
                others = (pair.scales.of_block(rows, *where) for rows in others)
            yield (ours.double(), *(rows.double() for rows in others))

    def wrong(self, why: str) -> CheckpointError:
        return _wrong(self.base, self.original, why)


def pair_with_original(
    base: Checkpoint,
    original: Checkpoint,
    tuned: Checkpoint,
    ignore_config: Collection[str] = (),
) -> Pairing:
    """As `pair_tensors`, but what the fine-tune is compared with are the original's tensors.

    Where the base's quantiser has moved scales from weights into norms, each pair says by what its
    difference is scaled. Raises CheckpointError if `base` is not `original`, stored otherwise.
    """
    changes = compare_configs(base, tuned, ignore_config)
    layout = read_layout(base.path)
    _check_layouts(base, layout, original, read_layout(original.path))
    pairing = match_tensors(original, tuned, changes)
    keys = layout.with_untied(pairing.untied).keys(base.tensors, base.name)
    trio = _Trio(base, original, tuned, keys)
    _check_as_is(trio, pairing)
    if differing := _differing_vectors(trio, pairing):
        pairing = _with_scales(trio, pairing, differing)
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


def _differing_vectors(trio: _Trio, pairing: Pairing) -> list[TensorPair]:
    """Norms and biases that the base has other values of, though it does not quantise them."""
    found = []
    for pair in pairing.pairs:
        if pair.is_matrix or pair.integral or not trio.original.tensors[pair.base_key].shape:
            continue
        for ours, theirs, _ in trio.pieces(pair, 1):
            if not _are_equal(ours, theirs):
                found.append(pair)
    return found


def _with_scales(trio: _Trio, pairing: Pairing, differing: list[TensorPair]) -> Pairing:
    """Find what the base's weights were scaled by, if that is why some norms differ."""
    scales: dict[str, Scales] = {}
    for pair in pairing.pairs:
        if pair.is_matrix and trio.base.quantisation is not None and not trio.stores_as_is(pair):
            original = trio.original.read_rows(pair.base_key).float()
            base = trio.base.read_rows(trio.base_keys[pair.name]).float()
            scales[pair.name] = matrix_scales(original, base)
    matrices = list(scales)
    columns = [found.columns for found in scales.values() if found.columns is not None]
    for pair in differing:
        found = None
        if pair.kind == "vector":
            ours = trio.base.read_rows(trio.base_keys[pair.name])
            found = vector_scales(trio.original.read_rows(pair.base_key), ours, columns)
        if found is None:
            raise trio.wrong(f"{_AS_IS.format(pair.name)}, which no scales of matrices explain")
        scales[pair.name] = found
    divided = [1 / scales[pair.name].rows for pair in differing]
    rows = [1 / scales[name].rows for name in matrices if bool((scales[name].rows > 0).all())]
    for name in matrices:
        by_norm = explained(scales[name], divided)
        scales[name] = explained(scales[name], rows) if by_norm is scales[name] else by_norm
    note = (
        f"{trio.base.name} has scales of weights in {len(differing)} norms (AWQ, SmoothQuant); the "
        "difference is scaled likewise"
    )
    pairs = tuple(replace(pair, scales=scales.get(pair.name)) for pair in pairing.pairs)
    return replace(pairing, pairs=pairs, notes=(*pairing.notes, note))


def _are_equal(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=_RELATIVE, atol=_ABSOLUTE)


def _check_as_is(trio: _Trio, pairing: Pairing) -> None:
    """Embeddings, say: what is read first, for it tells most at least cost."""
    for pair in pairing.pairs:
        if pair.is_matrix and trio.stores_as_is(pair):
            for ours, theirs, _ in trio.pieces(pair, _PIECES):
                if not _are_equal(ours, theirs):
                    raise trio.wrong(_AS_IS.format(pair.name))


def _check_matrices(trio: _Trio, pairing: Pairing) -> None:
    matrices = [p for p in pairing.pairs if p.is_matrix and not trio.stores_as_is(p)]
    for pair in matrices[:: max(1, len(matrices) // _MATRICES)]:
        sums = _Sums()
        for ours, theirs, tuned in trio.pieces(pair, _PIECES):
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
