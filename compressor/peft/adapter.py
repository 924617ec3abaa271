"""Import a PEFT adapter: its factors become `lowrank` terms, exactly; nothing is re-fitted.

PEFT's scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA; what each kind
multiplies is in `factors`. Modules saved whole, trained biases and trained tokens are stored as the
values that they are.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from compressor.peft.experts import Share
from compressor.peft.factors import FACTORS, Factors, initial_factors
from compressor.peft.keys import choose_adapter
from compressor.peft.parts import RESCALING, Parts, stored_parts
from compressor.peft.rescaled import RescaledParts, RescaleEncoder, dora_parts, ia3_parts
from compressor.peft.values import (
    exact_delta,
    first_difference,
    is_same_delta,
    lossless,
    rows_delta,
)

_HELD = 4  # tensors of factors of experts that are kept: a layer's


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
        self._shares: dict[str, Share] = {}
        self._held: dict[str, Tensor] = {}

    def deltas(
        self, base: Checkpoint, rescale: RescaleEncoder | None = None
    ) -> Iterator[TensorDelta]:
        """Yield the delta of every parameter the adapter changes, in the model's order.

        rescale  encodes what DoRA and IA3 have beside factors; None: such layers are stored
                 whole, exactly

        Raises UnsupportedTensor or CheckpointError naming what does not fit `base`.
        """
        layout = self.layout(base)
        keys = layout.keys(base.tensors, base.name)
        parts = self._parts(layout, base)
        for name, parameter in layout.parameters.items():
            if name not in parts:
                continue
            if RESCALING & parts[name].keys():
                yield self._rescaled(parameter, parts[name], base, keys[name], rescale)
                continue
            delta = self._delta(parameter, parts[name], base, keys[name])
            if delta is not None:
                yield delta

    def layout(self, base: Checkpoint) -> Layout:
        """Return the base's layout; what the adapter unties is a parameter of its own in it."""
        layout = read_layout(base.path)
        return layout.with_untied(self._untied(layout, base))

    def rescaled_shapes(self, base: Checkpoint) -> dict[str, Shape]:
        """Shapes of the layers whose rows or columns are rescaled, by parameter."""
        layout = self.layout(base)
        return {
            name: (layout.parameters[name].shape[0], layout.parameters[name].shape[1])
            for name, parts in self._parts(layout, base).items()
            if RESCALING & parts.keys()
        }

    def _parts(self, layout: Layout, base: Checkpoint) -> dict[str, Parts]:
        """Names of the stored tensors by parameter and part."""
        found = stored_parts(self._keys, self.tensors, self.settings, layout, base)
        self._shares = found.shares
        return found.parts

    def _untied(self, layout: Layout, base: Checkpoint) -> tuple[str, ...]:
        """Tied names that get another value than their twin: PEFT may change one of a pair."""
        parts, keys = self._parts(layout, base), layout.keys(base.tensors, base.name)
        untied = []
        for alias, target in layout.tied:
            first, second = parts.get(target, {}), parts.get(alias, {})
            if not first and not second:
                continue
            if not second and "tokens" in first and self.settings.tokens.get(""):
                continue  # given for the input embedding alone, PEFT trains them in both
            if first and second and not RESCALING & (first.keys() | second.keys()):
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
        if {"added", "gain"} & parts.keys() or parts.keys() == {"full"}:
            value = self._value(parameter, parts, base, base_key)
            return exact_delta(parameter, base.read_rows(base_key), value, self.name)
        a, b = self._factors(parameter, parts, base, base_key)
        rows, exact = parameter.shape[0], None
        if "full" in parts:
            exact = self._added_rows(parameter, parts["full"], base, base_key, a, b)
        if b.shape[1] != rows + (0 if exact is None else len(exact.values)):
            raise self._misfit(parameter)
        if exact is None and self._is_whole(parameter, a):
            ours, change = base.read_rows(base_key), b.T @ a
            value = ours.float() + (change.T if parameter.transposed else change)
            theirs = narrowed(value, ours.dtype, parameter.name)
            return exact_delta(parameter, ours, theirs, self.name)
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

    def _rescaled(
        self,
        parameter: Parameter,
        parts: Parts,
        base: Checkpoint,
        base_key: str,
        rescale: RescaleEncoder | None,
    ) -> TensorDelta:
        name, shape = parameter.name, parameter.shape
        weight = base.oriented_rows(base_key, 0, shape[0], parameter.transposed).float()
        split = self._split(parameter, parts, base, base_key, weight)
        if rescale is None:
            exact = DenseRows(0, weight + split.rest + split.b.T @ split.a)
            return TensorDelta(name, shape, shape, parameter.transposed, (), exact)
        terms = (lossless(split.a, split.b),) if len(split.a) else ()
        terms = (*terms, *rescale.encode(name, split))
        return TensorDelta(name, shape, shape, parameter.transposed, terms, None)

    def _split(
        self, parameter: Parameter, parts: Parts, base: Checkpoint, base_key: str, weight: Tensor
    ) -> RescaledParts:
        """What the adapter adds to a weight whose rows or columns it rescales."""
        if "ia3" in parts:
            return ia3_parts(parameter.name, weight, self.read_rows(parts["ia3"]).float())
        pair = {key: parts[key] for key in ("A", "B")}
        a, b = self._factors(parameter, pair, base, base_key)
        if b.shape[1] != parameter.shape[0]:
            raise self._misfit(parameter)
        if "full" in parts:  # of lm_head PEFT saves the weight under the factors too
            self._added_rows(parameter, parts["full"], base, base_key, a, b)
        return dora_parts(parameter.name, weight, a, b, self.read_rows(parts["magnitude"]).float())

    def _factors(
        self, parameter: Parameter, parts: Parts, base: Checkpoint, base_key: str
    ) -> tuple[Tensor, Tensor]:
        """Return ``a [r, n]`` and ``b [r, m]`` float32, the scaling in b."""
        try:
            a, b, rank = self._stored_factors(parameter, parts)
        except (RuntimeError, IndexError, ValueError) as error:  # shapes that do not go together
            raise self._misfit(parameter) from error
        if a.ndim != 2 or a.shape[0] != b.shape[0] or a.shape[1] != parameter.shape[1]:
            raise self._misfit(parameter)
        share = self._shares.get(parameter.name)
        module = parameter.name.removesuffix(".weight") if share is None else share.whole
        scaling = self.settings.scaling(module, rank)
        if not self.settings.start or rank is None or share is not None:
            return a.contiguous(), b * scaling
        weight = base.oriented_rows(base_key, 0, parameter.shape[0], parameter.transposed).float()
        first_a, first_b = initial_factors(self.settings.start, weight, rank, scaling)
        if first_a.shape[1:] != a.shape[1:] or first_b.shape[1:] != b.shape[1:]:
            raise self._misfit(parameter)
        return torch.cat([a, first_a]), torch.cat([b * scaling, -first_b])

    def _stored_factors(self, parameter: Parameter, parts: Parts) -> Factors:
        own = {part: key for part, key in parts.items() if part != "full"}
        if (share := self._shares.get(parameter.name)) is not None and own.keys() == {"A", "B"}:
            return share.factors(parameter, *(self._read_held(own[part]) for part in "AB"))
        make = FACTORS.get(frozenset(own))
        if make is None:
            raise UnsupportedTensor(
                f"{parameter.name}: the adapter holds {', '.join(sorted(parts))} for it; exactly "
                "one pair of LoRA factors is needed (VeRA: save_projection must be on)"
            )
        read = {part: self.read_rows(key).float() for part, key in own.items()}
        return make(read, (parameter.shape[0], parameter.shape[1]))

    def _read_held(self, key: str) -> Tensor:
        """A tensor that many parameters have a share of."""
        if key not in self._held:
            if len(self._held) >= _HELD:
                self._held.clear()
            self._held[key] = self.read_rows(key).float()
        return self._held[key]

    @staticmethod
    def _is_whole(parameter: Parameter, a: Tensor) -> bool:
        """Whether the value itself takes fewer bytes than factors, or there can be no terms."""
        m, n = parameter.shape
        return parameter.kind == "table" or len(a) * (m + n) > m * n

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
        if "gain" in parts:  # IA3 of the outputs
            gain = self.read_rows(parts["gain"]).float().flatten()
            if gain.shape != value.shape:
                raise self._misfit(parameter)
            return narrowed(value.float() * gain, value.dtype, parameter.name)
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
