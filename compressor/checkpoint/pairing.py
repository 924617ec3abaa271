"""Match the tensors of a base and its fine-tune, and refuse pairs no delta can describe."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from compressor.checkpoint.expert_rows import keys_in_form
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folded import Scales
from compressor.checkpoint.layout import Layout, read_layout
from compressor.checkpoint.parameter import Kind, Parameter, storable_shape
from compressor.checkpoint.settings import ConfigChanges, compare_configs
from compressor.codecs.term import Params, Shape
from compressor.errors import CheckpointError, UnsupportedTensor

# How many elements to compare or convert at a time.
CHUNK_ELEMENTS = 4 << 20
_MAX_WHOLE = 1 << 53  # beyond, not every whole number is a float64
_FIRST_LOOK_BYTES = 64 << 10  # what a full fine-tune changed shows at once


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One parameter on its way from two checkpoints into an artifact; each stage fills in more.

    parameter    as the base declares it; shapes are in ``[out, in]`` orientation
    shape        in the fine-tune
    base_key, tuned_key  its names in the checkpoints
    scales       that the base has in place of the base_key's checkpoint, see `folded`; or None

    What is stored of it (`to_store`):

    is_encoded   the rows that the base has, as terms
    exact_start  first row stored exactly, or None
    exact_bytes  of those rows

    params       settings of its codec, once they are planned
    """

    parameter: Parameter
    shape: tuple[int, ...]
    base_key: str
    tuned_key: str
    scales: Scales | None = None
    is_encoded: bool = False
    exact_start: int | None = None
    exact_bytes: int = 0
    params: Params | None = None

    @property
    def name(self) -> str:
        return self.parameter.name

    @property
    def kind(self) -> Kind:
        return self.parameter.kind

    @property
    def base_shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    @property
    def transposed(self) -> bool:
        return self.parameter.transposed

    @property
    def integral(self) -> bool:
        return self.parameter.integral

    @property
    def is_matrix(self) -> bool:
        return self.kind in ("linear", "embedding")

    @property
    def matrix_shape(self) -> Shape:
        """Of the terms: what the base has of a matrix."""
        m, n = self.base_shape
        return m, n


@dataclass(frozen=True, slots=True)
class Pairing:
    """Everything two checkpoints have in common.

    tied            (alias, stored name) pairs of the base
    untied          those aliases that the fine-tune has other values for
    config_changes  settings of the fine-tune's config.json that differ and are allowed to
    ignored_config  settings that change the computation and that the user lets differ
    notes           for the user
    """

    pairs: tuple[TensorPair, ...]
    tied: tuple[tuple[str, str], ...]
    untied: tuple[str, ...]
    config_changes: dict[str, Any]
    ignored_config: dict[str, Any]
    notes: tuple[str, ...] = ()


def pair_tensors(
    base: Checkpoint, tuned: Checkpoint, ignore_config: Collection[str] = ()
) -> Pairing:
    """Match by parameter name. Raises CheckpointError or UnsupportedTensor naming the culprit.

    ignore_config  settings that may differ though they change the computation
    """
    return match_tensors(base, tuned, compare_configs(base, tuned, ignore_config))


def match_tensors(base: Checkpoint, tuned: Checkpoint, changes: ConfigChanges) -> Pairing:
    """As `pair_tensors`, of checkpoints whose configurations have been compared."""
    layout, tuned_layout = read_layout(base.path), read_layout(tuned.path)
    _check_wrappers(base, layout)
    tuned_keys = tuned_layout.keys(tuned.tensors, tuned.name)
    _check_stored_ties(base, layout, layout.keys(base.tensors, base.name))
    _check_stored_ties(tuned, tuned_layout, tuned_keys)
    tied, untied = layout.tied, _untied(layout, tuned_layout, tuned, tuned_keys)
    layout = layout.with_untied(untied)
    base_keys = layout.keys(base.tensors, base.name)
    keys = keys_in_form(base, layout, tuned, tuned_layout, tuned_keys)
    _check_forms(layout, tuned_layout, keys)
    pairs = tuple(
        _pair(parameter, base, base_keys, tuned, keys) for parameter in layout.parameters.values()
    )
    _check_rows(tuned, tuned_layout, tuned_keys)
    notes = tuple(_unwrapped_note(tuned, tuned_layout))
    return Pairing(pairs, tied, untied, changes.kept, changes.ignored, notes)


def _check_wrappers(base: Checkpoint, layout: Layout) -> None:
    """A fine-tune's names may carry a wrapper's prefix; a base must load as it is."""
    if layout.unwrapped:
        raise CheckpointError(
            f"{base.name}: tensor {layout.unwrapped[0]} carries the prefix of a wrapper of the "
            "model, so transformers would start its weights at random; save the model that is "
            "inside the wrapper (model.module, model._orig_mod) and give that as the base"
        )


def _unwrapped_note(tuned: Checkpoint, layout: Layout) -> Iterator[str]:
    if layout.unwrapped:
        yield (
            f"{tuned.name}: {len(layout.unwrapped)} of {len(tuned.tensors)} tensors carry a "
            f"wrapper's prefix ({layout.unwrapped[0]}), which was taken off"
        )


def _check_rows(tuned: Checkpoint, layout: Layout, keys: Mapping[str, str]) -> None:
    """The fine-tune's tensors have the shapes that its own config.json says."""
    for name, parameter in layout.parameters.items():
        found = _oriented(tuned.tensors[keys[name]].shape, parameter)
        if found == parameter.shape:
            continue
        if parameter.kind == "embedding" or found[1:] == parameter.shape[1:]:
            raise CheckpointError(
                f"{tuned.name}: tensor {name} has {found[0]} rows, its config.json says "
                f"{parameter.shape[0]} (vocab_size); correct config.json, or save the model again "
                "after resize_token_embeddings"
            )
        raise CheckpointError(
            f"{tuned.name}: tensor {name} has shape {list(found)}, its config.json says "
            f"{list(parameter.shape)}; correct config.json"
        )


def is_unchanged(base: Checkpoint, tuned: Checkpoint, pair: TensorPair) -> bool:
    """Tell whether the fine-tune left the base's rows as they are (it may have added some).

    Compares bit by bit (by exact float32 value if the dtypes differ) and stops early.
    """
    stored = base.tensors[pair.base_key].shape
    if not stored or pair.integral:
        return _same(
            whole_value(base, pair.base_key, pair), whole_value(tuned, pair.tuned_key, pair)
        )
    per_row = max(1, base.tensors[pair.base_key].n_bytes // max(1, stored[0]))
    start, n_bytes = 0, _FIRST_LOOK_BYTES
    while start < stored[0]:
        end = min(start + max(1, n_bytes // per_row), stored[0])
        if not _same(
            base.read_rows(pair.base_key, start, end), tuned.read_rows(pair.tuned_key, start, end)
        ):
            return False
        start, n_bytes = end, min(2 * n_bytes, 2 * CHUNK_ELEMENTS)
    return True


def whole_value(checkpoint: Checkpoint, key: str, pair: TensorPair) -> torch.Tensor:
    """A tensor that is stored exactly, as an artifact has it: whole numbers in float64."""
    found = checkpoint.read_stored(key).reshape(-1, *pair.shape[1:])
    if not pair.integral:
        return found
    if found.dtype == torch.int64 and bool((found.abs() > _MAX_WHOLE).any()):
        raise UnsupportedTensor(
            f"{pair.name}: whole numbers above 2^53 cannot be stored in a delta; serve the "
            "fine-tune by itself"
        )
    return found.to(torch.float64)


def to_store(tuned: Checkpoint, pair: TensorPair, *, unchanged: bool) -> TensorPair | None:
    """Decide what is stored of a tensor; None for nothing (its base rows equal the fine-tune's).

    Matrices are encoded; vectors, convolutions, tables and added rows are stored exactly.
    """
    added = pair.shape[0] - pair.base_shape[0] if pair.shape else 0
    if unchanged and not added:
        return None
    item = torch.float64 if pair.integral else tuned.dtype(pair.tuned_key)
    row_bytes = math.prod(pair.shape[1:]) * item.itemsize
    if not pair.is_matrix:
        return replace(pair, exact_start=0, exact_bytes=pair.shape[0] * row_bytes)
    start = pair.base_shape[0] if added else None
    return replace(pair, is_encoded=not unchanged, exact_start=start, exact_bytes=added * row_bytes)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype == b.dtype:
        bits = {2: torch.int16, 4: torch.int32}.get(a.dtype.itemsize, torch.int64)
        return torch.equal(a.view(bits), b.view(bits))
    return torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


def _pair(
    parameter: Parameter,
    base: Checkpoint,
    base_keys: Mapping[str, str],
    tuned: Checkpoint,
    tuned_keys: Mapping[str, str],
) -> TensorPair:
    name = parameter.name
    for checkpoint, keys in ((base, base_keys), (tuned, tuned_keys)):
        stored_dtype(checkpoint, keys[name], parameter)
    base_shape = _oriented(base.tensors[base_keys[name]].shape, parameter)
    shape = _oriented(tuned.tensors[tuned_keys[name]].shape, parameter)
    if base_shape != parameter.shape:
        raise CheckpointError(
            f"{base.name}: tensor {name} has shape {list(base_shape)}, config.json says "
            f"{list(parameter.shape)}; correct config.json"
        )
    _check_shapes(parameter, base_shape, shape)
    return TensorPair(parameter, shape, base_keys[name], tuned_keys[name])


def stored_dtype(checkpoint: Checkpoint, key: str, parameter: Parameter) -> torch.dtype:
    """The dtype that a parameter is stored in; refuses floats for whole numbers and the reverse."""
    return checkpoint.integer_dtype(key) if parameter.integral else checkpoint.dtype(key)


def _check_shapes(parameter: Parameter, base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
    if base == tuned:
        return
    same_rest = len(base) == len(tuned) and len(base) >= 1 and base[1:] == tuned[1:]
    if same_rest and tuned[0] > base[0] and not parameter.transposed:
        return  # added vocabulary
    if same_rest and tuned[0] < base[0]:
        raise UnsupportedTensor(
            f"{parameter.name}: the fine-tune has {tuned[0]} rows, the base {base[0]}; removed "
            "vocabulary is not supported. Keep the base's rows (resize_token_embeddings back)"
        )
    raise UnsupportedTensor(
        f"{parameter.name}: the fine-tune's shape {list(tuned)} does not fit the base's "
        f"{list(base)}; give the base that it was made from"
    )


def _oriented(shape: tuple[int, ...], parameter: Parameter) -> tuple[int, ...]:
    shape = storable_shape(shape)
    return (shape[1], shape[0]) if parameter.transposed and len(shape) == 2 else shape


def _untied(
    base: Layout, tuned: Layout, checkpoint: Checkpoint, keys: dict[str, str]
) -> tuple[str, ...]:
    """The base's tied aliases that have other values than their twins in the fine-tune.

    keys  of the fine-tune; gets those of aliases that it has tied and the base has not
    """
    for alias, target in set(tuned.tied) - set(base.tied):
        keys.setdefault(alias, keys[target])
    return tuple(
        alias
        for alias, target in base.tied
        if (alias, target) not in tuned.tied
        and not _hold_the_same(checkpoint, keys[alias], keys[target])
    )


def _hold_the_same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    if checkpoint.tensors[first].shape != checkpoint.tensors[second].shape:
        return False
    n_rows = checkpoint.tensors[first].shape[0]
    return all(
        _same(
            checkpoint.read_rows(first, start, min(start + 4096, n_rows)),
            checkpoint.read_rows(second, start, min(start + 4096, n_rows)),
        )
        for start in range(0, n_rows, 4096)
    )


def _check_forms(base: Layout, tuned: Layout, keys: Mapping[str, str]) -> None:
    """Both store the same parameters, or the same experts together and one by one.

    keys  of the fine-tune, by the base's names as far as these could be given
    """
    ours = base.parameters.keys() | dict(base.tied).keys()
    if differing := sorted(ours ^ (keys.keys() | dict(tuned.tied).keys())):
        where, other = "base", "fine-tune"
        if differing[0] not in ours:
            where, other = other, where
        raise UnsupportedTensor(
            f"{differing[0]}: stored like this in the {where} only, and transformers has no rule "
            f"that makes it of what the {other} stores; load and save both models with one version "
            "of it (AutoModelForCausalLM.from_pretrained(d, dtype='auto').save_pretrained(o))"
        )


def _check_stored_ties(checkpoint: Checkpoint, layout: Layout, keys: Mapping[str, str]) -> None:
    """A file may hold both of a tied pair; transformers then keeps them apart if they differ."""
    for alias, target in layout.tied:
        if alias not in keys or keys[alias] == keys[target]:
            continue
        if not _hold_the_same(checkpoint, keys[alias], keys[target]):
            raise UnsupportedTensor(
                f"{alias}: config.json of {checkpoint.name} ties it to {target}, but the "
                "checkpoint stores two different tensors; if both are meant, set "
                "tie_word_embeddings to false there"
            )
