"""LoRA on parameters rather than modules (``target_parameters``): mostly all experts of a layer.

PEFT wraps the module once for each parameter that is targeted, in the order in which the module has
them, and keeps the factors of all experts in two matrices: those of expert e are the rows
``e r .. (e + 1) r`` of A, and the columns ``e, e + E, e + 2 E, ...`` of B (``lora/layer.py``,
`ParamWrapper`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compressor.checkpoint.expert_rows import expert_parts
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import slice_name
from compressor.checkpoint.layout import Layout, Parameter, empty_model
from compressor.peft.factors import Factors


@dataclass(frozen=True, slots=True)
class Share:
    """What a parameter of the base has of a targeted one.

    whole      the targeted parameter, as the model calls it
    shape      of one matrix in it, as the model has it
    is_turned  the model says that its matrices are ``[in, out]``
    expert     which matrix, of how many
    rows       of that matrix
    """

    whole: str
    shape: tuple[int, int]
    is_turned: bool
    expert: int
    n_experts: int
    rows: slice

    def factors(self, parameter: Parameter, a: Tensor, b: Tensor) -> Factors:
        """Take the share out of the stored factors. ValueError if they do not fit.

        a  ``[E r, in]``; b  ``[out, E r]``: which side is called in has changed between versions
        """
        m, n = self.shape
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] % self.n_experts or len(a) != b.shape[1]:
            raise ValueError("factors of another number of experts")
        rank = a.shape[0] // self.n_experts
        own_a = a[self.expert * rank : (self.expert + 1) * rank]
        own_b = b.reshape(len(b), rank, self.n_experts)[:, :, self.expert]
        sizes = len(b), a.shape[1]
        if sizes not in ((m, n), (n, m)):
            raise ValueError("factors of another shape")
        is_plain = sizes == (m, n) and not (m == n and self.is_turned)
        left, right = (own_b, own_a) if is_plain else (own_a.T, own_b.T)
        left = left[self.rows]
        if parameter.transposed:
            return Factors(left.T, right, rank)
        return Factors(right, left.T, rank)


class TargetedParameters:
    """The parameters of a base that an adapter's ``target_parameters`` mean."""

    def __init__(self, base: Checkpoint, targets: Sequence[str], layout: Layout) -> None:
        self._layout = layout
        self._shares: dict[str, dict[str, Share]] = {}
        self._model = empty_model(base.path)
        self._prefix = self._model.base_model_prefix
        self._names: dict[str, list[str]] = {}
        for module, found in self._model.named_modules():
            for part, _ in found.named_parameters(recurse=False):
                name = f"{module}.{part}"
                if any(name == target or name.endswith(f".{target}") for target in targets):
                    self._names.setdefault(module, []).append(name)

    def find(self, module: str, depth: int) -> str | None:
        """Return whose factors are stored under `module`, below `depth` further wrappers."""
        for path in (module, f"{self._prefix}.{module}"):
            names = self._names.get(path, [])
            if depth < len(names):
                return names[len(names) - 1 - depth]
        return None

    def shares(self, name: str) -> dict[str, Share]:
        """Return what each parameter of the layout has of the targeted one; empty if none has."""
        if name not in self._shares:  # asked for both factors
            self._shares[name] = self._find_shares(name)
        return self._shares[name]

    def _find_shares(self, name: str) -> dict[str, Share]:
        module, _, part = name.rpartition(".")
        owner = self._model.get_submodule(module)
        shape, is_turned = tuple(getattr(owner, part).shape), getattr(owner, "is_transposed", False)
        if len(shape) == 2:
            m, n = shape
            found = {name: Share(name, (m, n), False, 0, 1, slice(0, m))}
        elif len(shape) == 3:
            count, m, n = shape
            whole = {e: Share(name, (m, n), is_turned, e, count, slice(0, m)) for e in range(count)}
            found = {slice_name(name, e): share for e, share in whole.items()}
            if slice_name(name, 0) not in self._layout.parameters:
                parts = expert_parts(self._model, name, count, m)
                found = {
                    part: Share(
                        name, (m, n), is_turned, rows.expert, count, slice(rows.start, rows.end)
                    )
                    for part, rows in parts.items()
                }
        else:
            found = {}
        return found if found.keys() <= self._layout.parameters.keys() else {}
