"""Import a PEFT adapter: its factors become `lowrank` terms, exactly; nothing is re-fitted.

PEFT's scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA; what each kind
multiplies is in `factors`. Modules saved whole, trained biases and trained tokens are stored as the
values that they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.checkpoint.files import Checkpoint, TensorFiles
from compressor.checkpoint.hub import cached_ref
from compressor.checkpoint.layout import Layout, Parameter, read_layout
from compressor.checkpoint.writer import narrowed
from compressor.codecs import DenseRows, Shape, TensorDelta
from compressor.errors import CheckpointError, UnsupportedTensor
from compressor.peft.config import WEIGHTS, read_settings
from compressor.peft.dora import RescaleEncoder, dora_parts
from compressor.peft.factors import FACTORS, SHARED
from compressor.peft.keys import AdapterKey, choose_adapter
from compressor.peft.values import (
    exact_delta,
    first_difference,
    is_same_delta,
    lossless,
    rows_delta,
)

Parts = Mapping[str, str]


class Adapter(TensorFiles):
    """An adapter directory, opened and checked. Use as a context manager.

    adapter_name  which one, if the file holds several
    """

    def __init__(self, path: Path, adapter_name: str | None = None) -> None:
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
        self._keys = choose_adapter(self.tensors, adapter_name)

    def deltas(
        self, base: Checkpoint, rescale: RescaleEncoder | None = None
    ) -> Iterator[TensorDelta]:
        """Yield the delta of every parameter the adapter changes, in the model's order.

        rescale  encodes what a DoRA layer has beside its factors; None: such layers are stored
                 whole, exactly

        Raises UnsupportedTensor or CheckpointError naming what does not fit `base`.
        """
        layout = self.layout(base)
        keys = layout.keys(base.tensors, base.name)
        parts = self._parts(layout)
        for name, parameter in layout.parameters.items():
            if name not in parts:
                continue
            if "magnitude" in parts[name]:
                yield self._dora(parameter, parts[name], base, keys[name], rescale)
                continue
            delta = self._delta(parameter, parts[name], base, keys[name])
            if delta is not None:
                yield delta

    def layout(self, base: Checkpoint) -> Layout:
        """Return the base's layout; what the adapter unties is a parameter of its own in it."""
        layout = read_layout(base.path)
        return layout.with_untied(self._untied(layout, base))

    def dora_shapes(self, base: Checkpoint) -> dict[str, Shape]:
        """Shapes of the layers with learned lengths, by parameter."""
        layout = self.layout(base)
        return {
            name: (layout.parameters[name].shape[0], layout.parameters[name].shape[1])
            for name, parts in self._parts(layout).items()
            if "magnitude" in parts
        }

    # --- which tensors belong to which parameter ------------------------------------------------

    def _parts(self, layout: Layout) -> dict[str, Parts]:
        """Names of the stored tensors by parameter and part."""
        parts: dict[str, dict[str, str]] = {}
        shared: dict[str, str] = {}
        for key, entry in self._keys.items():
            if entry.part in SHARED:
                shared[entry.part] = key
            else:
                parts.setdefault(self._target(layout, key, entry), {})[entry.part] = key
        for name, found in parts.items():
            if any(part.startswith("vera_") for part in found):
                found.update(shared)
            self._check_dora(name, found)
        return {**parts}

    def _target(self, layout: Layout, key: str, entry: AdapterKey) -> str:
        """Return the parameter a stored tensor belongs to."""
        name = layout.find(entry.parameter)
        if name is None and entry.part == "added":
            raise UnsupportedTensor(
                f"{key}: lora_bias adds a bias to a layer that has none in the base, which no "
                "delta and no merged model can hold; train without lora_bias"
            )
        if name is None:
            raise UnsupportedTensor(f"{key}: the base has no parameter {entry.parameter} for it")
        parameter = layout.parameters.get(name)
        is_matrix = parameter is None or parameter.kind in ("linear", "embedding")
        if entry.part not in ("full", "added") and not is_matrix:
            raise UnsupportedTensor(
                f"{name}: LoRA factors on a module that is no linear or embedding"
            )
        return name

    def _check_dora(self, name: str, found: Parts) -> None:
        factors = {"A", "embedding_A"} & found.keys()
        if self.settings.is_dora and factors and "magnitude" not in found:
            raise UnsupportedTensor(f"{name}: use_dora is set, but it has no magnitude vector")
        if "magnitude" in found and found.keys() - {"full"} != {"A", "B", "magnitude"}:
            raise UnsupportedTensor(
                f"{name}: lora_magnitude_vector is supported beside the factors of a linear "
                f"layer, found {', '.join(sorted(found))}; merge the adapter (merge_and_unload)"
            )
        if "magnitude" in found and not self.settings.is_dora:
            raise UnsupportedTensor(f"{name}: lora_magnitude_vector, but use_dora is not set")

    def _untied(self, layout: Layout, base: Checkpoint) -> tuple[str, ...]:
        """Tied names that get another value than their twin: PEFT may change one of a pair."""
        parts, keys = self._parts(layout), layout.keys(base.tensors, base.name)
        untied = []
        for alias, target in layout.tied:
            first, second = parts.get(target, {}), parts.get(alias, {})
            if not first and not second:
                continue
            if not second and "tokens" in first and self.settings.tokens.get(""):
                continue  # given for the input embedding alone, PEFT trains them in both
            if first and second and "magnitude" not in first.keys() | second.keys():
                parameter, key = layout.parameters[target], keys[target]
                one = self._delta(parameter, first, base, key)
                two = self._delta(replace(parameter, name=alias), second, base, key)
                if is_same_delta(one, two):
                    continue
            untied.append(alias)
        return tuple(untied)

    # --- what becomes of a parameter ------------------------------------------------------------

    def _delta(
        self, parameter: Parameter, parts: Parts, base: Checkpoint, base_key: str
    ) -> TensorDelta | None:
        if "tokens" in parts:
            return self._tokens(parameter, parts, base, base_key)
        if "added" in parts or parts.keys() == {"full"}:
            value = self._value(parameter, parts, base, base_key)
            return exact_delta(parameter, base.read_rows(base_key), value, self.name)
        a, b = self._factors(parameter, parts)
        rows, exact = parameter.shape[0], None
        if "full" in parts:
            exact = self._added_rows(parameter, parts["full"], base, base_key, a, b)
        if b.shape[1] != rows + (0 if exact is None else len(exact.values)):
            raise self._misfit(parameter)
        kept = b[:, :rows].contiguous()
        # B starts at zero: then this module was never trained.
        terms = (lossless(a, kept),) if bool(a.any()) and bool(kept.any()) else ()
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

    def _dora(
        self,
        parameter: Parameter,
        parts: Parts,
        base: Checkpoint,
        base_key: str,
        rescale: RescaleEncoder | None,
    ) -> TensorDelta:
        name, shape = parameter.name, parameter.shape
        a, b = self._factors(parameter, {key: parts[key] for key in ("A", "B")})
        if b.shape[1] != shape[0]:
            raise self._misfit(parameter)
        weight = base.oriented_rows(base_key, 0, shape[0], parameter.transposed).float()
        if "full" in parts:  # of lm_head PEFT saves the weight under the factors too
            self._added_rows(parameter, parts["full"], base, base_key, a, b)
        split = dora_parts(name, weight, a, b, self.read_rows(parts["magnitude"]).float())
        if rescale is None:
            whole = weight + split.rest + split.b.T @ a
            exact = DenseRows(0, whole)
            return TensorDelta(name, shape, shape, parameter.transposed, (), exact)
        terms = (lossless(a, split.b), *rescale.encode(name, split, a))
        return TensorDelta(name, shape, shape, parameter.transposed, terms, None)

    def _factors(self, parameter: Parameter, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return ``a [r, n]`` and ``b [r, m]`` float32, the scaling in b."""
        make = FACTORS.get(frozenset(parts.keys() - {"full"}))
        if make is None:
            raise UnsupportedTensor(
                f"{parameter.name}: the adapter holds {', '.join(sorted(parts))} for it; exactly "
                "one pair of LoRA factors is needed (VeRA: save_projection must be on)"
            )
        read = {part: self.read_rows(key).float() for part, key in parts.items() if part != "full"}
        try:
            a, b, rank = make(read, (parameter.shape[0], parameter.shape[1]))
        except (RuntimeError, IndexError) as error:  # shapes that do not go together
            raise self._misfit(parameter) from error
        if a.ndim != 2 or a.shape[0] != b.shape[0] or a.shape[1] != parameter.shape[1]:
            raise self._misfit(parameter)
        module = parameter.name.removesuffix(".weight")
        return a.contiguous(), b * self.settings.scaling(module, rank)

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
        if first_difference(base.read_rows(base_key), under) != rows:
            raise UnsupportedTensor(
                f"{parameter.name}: the weight saved under the adapter's factors is not the "
                "base's; is this the right base?"
            )
        if under.shape[0] == rows:
            return None
        values = under[rows:].float() + b[:, rows : under.shape[0]].T @ a
        return DenseRows(rows, narrowed(values, under.dtype, parameter.name))

    def _value(self, parameter: Parameter, parts: Parts, base: Checkpoint, base_key: str) -> Tensor:
        """The value of a parameter that is stored whole, in the checkpoint's orientation."""
        value = self.read_rows(parts["full"]) if "full" in parts else base.read_rows(base_key)
        if "added" not in parts:
            return value
        module = parameter.name.removesuffix(".bias")
        added = self.read_rows(parts["added"]).float() * self._bias_scaling(module)
        if added.shape != value.shape:
            raise self._misfit(parameter)
        return narrowed(value.float() + added, value.dtype, parameter.name)

    def _bias_scaling(self, module: str) -> float:
        """A bias of B is scaled as the product of the factors beside it."""
        for key, entry in self._keys.items():
            if entry.part == "A" and f"{entry.parameter}".endswith(f"{module}.weight"):
                return self.settings.scaling(module, self.tensors[key].shape[0])
        raise UnsupportedTensor(f"{module}: a bias of LoRA factors that are not there")

    def _tokens(
        self, parameter: Parameter, parts: Parts, base: Checkpoint, base_key: str
    ) -> TensorDelta | None:
        """Rows that were trained by themselves: what is stored are their new values."""
        module = parameter.name.removesuffix(".weight")
        rows, values = self.settings.token_rows(module), self.read_rows(parts["tokens"])
        if parts.keys() - {"tokens", "full"} or rows is None:
            raise UnsupportedTensor(
                f"{parameter.name}: the adapter holds {', '.join(sorted(parts))} for it; trained "
                "tokens must be all of it, and named in its configuration"
            )
        ours = base.read_rows(base_key)
        whole = self.read_rows(parts["full"]) if "full" in parts else ours
        if values.shape != (len(rows), *whole.shape[1:]) or max(rows, default=0) >= len(whole):
            raise self._misfit(parameter)
        index = torch.tensor(rows, dtype=torch.int64)
        changed = whole.index_copy(0, index, narrowed(values, whole.dtype, parameter.name))
        if "full" in parts:
            return exact_delta(parameter, ours, changed, self.name)
        return rows_delta(parameter, ours, changed, index.sort().values)
