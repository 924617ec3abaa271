"""Import a PEFT LoRA adapter: its factors become `lowrank` terms, exactly; nothing is re-fitted.

Conventions of PEFT (its `lora/layer.py`): ``dW = scaling * B A`` with ``A [r, in]``, ``B [out, r]``
for Linear and Conv1D alike; for Embedding ``dW = scaling * (B A)^T`` with ``A [r, vocabulary]``,
``B [width, r]``; scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from compressor.checkpoint.files import Checkpoint, TensorFiles
from compressor.checkpoint.hub import cached_ref
from compressor.checkpoint.layout import Layout, Parameter, read_layout
from compressor.checkpoint.writer import narrowed
from compressor.codecs import (
    DenseRows,
    LowRankTerm,
    Shape,
    TensorDelta,
    lowrank_from_factors,
)
from compressor.errors import CheckpointError, UnsupportedTensor
from compressor.peft.config import WEIGHTS, read_settings
from compressor.peft.dora import RescaleEncoder, dora_parts

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>A|B)(\.[^.]+)?\.weight$")
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$")
_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<part>A|B)(\.[^.]+)?$")


class Adapter(TensorFiles):
    """A LoRA adapter directory, opened and checked. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = read_settings(path)
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(
                f"{path}: {WEIGHTS} is missing; an adapter_model.bin is a pickle: convert it once "
                "where you trust it with peft, PeftModel.from_pretrained(base, dir)"
                ".save_pretrained(out)"
            )
        ref = cached_ref(path)
        super().__init__(ref.repo if ref else path.resolve().name, [path / WEIGHTS])

    def deltas(
        self, base: Checkpoint, rescale: RescaleEncoder | None = None
    ) -> Iterator[TensorDelta]:
        """Yield the delta of every parameter the adapter changes, in the model's order.

        rescale  encodes what a DoRA layer has beside its factors; None: such layers are stored
                 whole, exactly

        Raises UnsupportedTensor or CheckpointError naming what does not fit `base`.
        """
        layout = read_layout(base.path)
        keys = layout.keys(base.tensors, base.name)
        parts = self._parts(layout)
        self._check_ties(layout, parts)
        for name, parameter in layout.parameters.items():
            if name not in parts:
                continue
            if "magnitude" in parts[name]:
                yield self._dora(parameter, parts[name], base, keys[name], rescale)
                continue
            delta = self._delta(parameter, parts[name], base, keys[name])
            if delta is not None:
                yield delta

    def dora_shapes(self, base: Checkpoint) -> dict[str, Shape]:
        """Shapes of the layers with learned lengths, by parameter."""
        layout = read_layout(base.path)
        return {
            name: (layout.parameters[name].shape[0], layout.parameters[name].shape[1])
            for name, parts in self._parts(layout).items()
            if "magnitude" in parts
        }

    def _parts(self, layout: Layout) -> dict[str, dict[str, str]]:
        """Names of the stored tensors by parameter and part."""
        parts: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            if ".original_module." not in key:  # PEFT's untouched copy of a module saved whole
                name, part = _target(layout, key)
                parts.setdefault(name, {})[part] = key
        for name, found in parts.items():
            factors = {"A", "embedding_A"} & found.keys()
            if self.settings.is_dora and factors and "magnitude" not in found:
                raise UnsupportedTensor(f"{name}: use_dora is set, but it has no magnitude vector")
            if "magnitude" in found and found.keys() != {"A", "B", "magnitude"}:
                raise UnsupportedTensor(
                    f"{name}: lora_magnitude_vector is supported beside the factors of a linear "
                    f"layer, found {', '.join(sorted(found))}; merge the adapter (merge_and_unload)"
                )
            if "magnitude" in found and not self.settings.is_dora:
                raise UnsupportedTensor(f"{name}: lora_magnitude_vector, but use_dora is not set")
        return parts

    def _dora(
        self,
        parameter: Parameter,
        parts: Mapping[str, str],
        base: Checkpoint,
        base_key: str,
        rescale: RescaleEncoder | None,
    ) -> TensorDelta:
        name, shape = parameter.name, parameter.shape
        a, b = self._factors(parameter, {key: parts[key] for key in ("A", "B")})
        if b.shape[1] != shape[0]:
            raise self._misfit(parameter)
        weight = base.oriented_rows(base_key, 0, shape[0], parameter.transposed).float()
        split = dora_parts(name, weight, a, b, self.read_rows(parts["magnitude"]).float())
        if rescale is None:
            whole = weight + split.rest + split.b.T @ a
            exact = DenseRows(0, whole)
            return TensorDelta(name, shape, shape, parameter.transposed, (), exact)
        terms = (_lossless(a, split.b), *rescale.encode(name, split, a))
        return TensorDelta(name, shape, shape, parameter.transposed, terms, None)

    def _check_ties(self, layout: Layout, parts: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse what would untie: PEFT changes one module of a tied pair, a delta both."""
        for alias, target in layout.tied:
            first, second = parts.get(target, {}), parts.get(alias, {})
            if first.keys() == second.keys() == {"full"} and torch.equal(
                self.read_rows(first["full"]), self.read_rows(second["full"])
            ):
                continue
            if first or second:
                raise UnsupportedTensor(
                    f"{alias if second else target}: the adapter changes it, but in the base "
                    f"{alias} is tied to {target}; a delta cannot untie them"
                )

    def _delta(
        self, parameter: Parameter, parts: Mapping[str, str], base: Checkpoint, base_key: str
    ) -> TensorDelta | None:
        if parts.keys() == {"full"}:
            return self._exact(parameter, parts["full"], base, base_key)
        a, b = self._factors(parameter, parts)
        rows, exact = parameter.shape[0], None
        if "full" in parts:
            exact = self._added_rows(parameter, parts["full"], base, base_key, a, b)
        if b.shape[1] != rows + (0 if exact is None else len(exact.values)):
            raise self._misfit(parameter)
        kept = b[:, :rows].contiguous()
        # B starts at zero: then this module was never trained.
        terms = (_lossless(a, kept),) if bool(a.any()) and bool(kept.any()) else ()
        if not terms and exact is None:
            return None
        return TensorDelta(
            name=parameter.name,
            shape=(b.shape[1], *parameter.shape[1:]),
            base_shape=parameter.shape,
            transposed=parameter.transposed,
            terms=terms,
            exact=exact,
        )

    def _factors(self, parameter: Parameter, parts: Mapping[str, str]) -> tuple[Tensor, Tensor]:
        """Return ``a [r, n]`` and ``b [r, m]`` float32, the scaling in b."""
        if parts.keys() - {"full"} not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise UnsupportedTensor(
                f"{parameter.name}: the adapter holds {', '.join(sorted(parts))} for it; exactly "
                "one pair of LoRA factors is needed"
            )
        if "A" in parts:
            a, b = self.read_rows(parts["A"]).float(), self.read_rows(parts["B"]).float().T
        else:
            a = self.read_rows(parts["embedding_B"]).float().T
            b = self.read_rows(parts["embedding_A"]).float()
        if a.ndim != 2 or a.shape[0] != b.shape[0] or a.shape[1] != parameter.shape[1]:
            raise self._misfit(parameter)
        module = parameter.name.removesuffix(".weight")
        return a.contiguous(), b * self.settings.scaling(module, a.shape[0])

    def _misfit(self, parameter: Parameter) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: the factors of {parameter.name} do not fit its shape "
            f"{list(parameter.shape)}; is this the right base?"
        )

    def _added_rows(
        self, parameter: Parameter, key: str, base: Checkpoint, base_key: str, a: Tensor, b: Tensor
    ) -> DenseRows | None:
        """Rows a resized embedding has beyond the base's, with their share of the factors.

        PEFT saves the weight under the factors of an embedding or lm_head as well; its first
        rows must be the base's.
        """
        rows, under = parameter.shape[0], self.read_rows(key)
        if under.shape[1:] != parameter.shape[1:] or under.shape[0] < rows:
            raise self._misfit(parameter)
        if _first_difference(base.read_rows(base_key), under) != rows:
            raise UnsupportedTensor(
                f"{parameter.name}: the weight saved under the adapter's factors is not the "
                "base's; is this the right base?"
            )
        if under.shape[0] == rows:
            return None
        values = under[rows:].float() + b[:, rows : under.shape[0]].T @ a
        return DenseRows(rows, narrowed(values, under.dtype, parameter.name))

    def _exact(
        self, parameter: Parameter, key: str, base: Checkpoint, base_key: str
    ) -> TensorDelta | None:
        """A module saved whole: stored exactly, from its first row that differs."""
        ours, theirs = base.read_rows(base_key), self.read_rows(key)
        if parameter.transposed:
            ours, theirs = ours.T, theirs.T
        grown = theirs.ndim == ours.ndim and theirs.shape[1:] == ours.shape[1:]
        if not grown or theirs.shape[0] < ours.shape[0]:
            raise CheckpointError(
                f"{self.name}: {parameter.name} has shape {list(theirs.shape)}, the base "
                f"{list(ours.shape)}"
            )
        start = _first_difference(ours, theirs)
        if start == theirs.shape[0]:
            return None
        if theirs.ndim == 1:
            start = 0
        return TensorDelta(
            name=parameter.name,
            shape=tuple(theirs.shape),
            base_shape=parameter.shape,
            transposed=parameter.transposed,
            terms=(),
            exact=DenseRows(start, theirs[start:].contiguous()),
        )


def _target(layout: Layout, key: str) -> tuple[str, str]:
    """Return the parameter a stored tensor belongs to, and which part of its delta it is."""
    path = key.removeprefix("base_model.model.")
    if match := _FACTOR.match(path):
        wanted, part = f"{match['module']}.weight", match["part"]
    elif match := _EMBEDDING.match(path):
        wanted, part = f"{match['module']}.weight", f"embedding_{match['part']}"
    elif match := _MAGNITUDE.match(path):
        wanted, part = f"{match['module']}.weight", "magnitude"
    else:
        wanted, part = re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", path), "full"
    name = layout.find(wanted)
    if name is None:
        raise UnsupportedTensor(f"{key}: the base has no parameter {wanted} for it")
    parameter = layout.parameters.get(name)
    if part != "full" and parameter and parameter.kind not in ("linear", "embedding"):
        raise UnsupportedTensor(f"{name}: LoRA factors on a module that is no linear or embedding")
    return name, part


def _lossless(a: Tensor, b: Tensor) -> LowRankTerm:
    """16-bit factors if those are exact (a bfloat16 adapter's mostly are), else 32-bit ones."""
    small = lowrank_from_factors(a, b, 16)
    if torch.equal(small.a, a) and torch.equal(small.b, b):
        return small
    return lowrank_from_factors(a, b, 32)


def _first_difference(ours: Tensor, theirs: Tensor) -> int:
    differs = ours.float() != theirs[: ours.shape[0]].float()
    rows = differs.reshape(differs.shape[0], -1).any(-1).nonzero()
    return int(rows[0]) if len(rows) else ours.shape[0]
