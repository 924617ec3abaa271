"""Find the experts and routers of a model and make them delta-aware."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from server.deltas.experts import ExpertParameter, ExpertsProjection
from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.deltas.whole import WholeParameter
from server.model.context import StepContext
from server.model.embedding import DeltaEmbedding
from server.model.experts import DeltaEveryExpert, DeltaExperts, ExpertsPart, ExpertsProduct
from server.model.linear import DeltaLinear
from server.model.norm import DeltaNorm
from server.model.router import split_routers
from server.ops.kernels import Kernels

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"


def install_experts(
    model: PreTrainedModel,
    parameters: dict[str, DeltaParameter],
    context: StepContext,
    kernels: Kernels,
    residency: Residency,
) -> None:
    """Add the model's experts, their biases and their routers to `parameters`. After linears,
    embeddings and norms. An experts module that transformers computes otherwise is left alone: a
    delta of it finds no parameter and is refused.
    """
    found = {path: module for path, module in model.named_modules() if _is_known(module)}
    if not found:
        return
    maker = _Maker(parameters, _saved_parts(model, found), kernels, residency)
    for path, module in found.items():
        first, last = (maker.product(module, path, name) for name in (_first(module), LAST))
        kind = DeltaExperts if _is_interface(module) else DeltaEveryExpert
        kind(module, first, last, context)
    known = (DeltaLinear, DeltaEmbedding, DeltaNorm)
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in found):
        split_routers(model.get_submodule(parent), parent, context, maker.whole, known)


def _is_known(module: nn.Module) -> bool:
    """Whether it is computed by transformers' experts interface, or as Llama 4 does."""
    own = {n for n, tensor in module.named_parameters(recurse=False) if tensor.dim() == 3}
    has_products = LAST in own and not own.isdisjoint(FIRST)
    return has_products and (_is_interface(module) or _gives_all_rows(module))


def _is_interface(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _is_turned(module: nn.Module) -> bool:
    """Whether its weights are ``[E, in, out]``."""
    return not _is_interface(module) or bool(module.is_transposed)


@torch.inference_mode()
def _gives_all_rows(module: nn.Module) -> bool:
    """Whether its forward is `DeltaEveryExpert`'s, tried on a row for each expert."""
    weights = [module._parameters.get(name) for name in (FIRST[0], LAST)]
    if any(weight is None for weight in weights) or not hasattr(module, "act_fn"):
        return False
    first, last = (weight for weight in weights if weight is not None)
    asked = [
        n for n, p in inspect.signature(module.forward).parameters.items() if p.default is p.empty
    ]
    if len(asked) != 1 or first.shape[1:] != (last.shape[2], 2 * last.shape[1]):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(first), first.shape[1], generator=generator).to(first)
    gate, up = torch.bmm(x.unsqueeze(1), first).chunk(2, dim=-1)
    act_fn: Any = module.act_fn
    ours = torch.bmm(up * act_fn(gate), last)[:, 0]
    return torch.equal(ours, module(x).view_as(ours))


def _first(module: nn.Module) -> str:
    return next(name for name in FIRST if name in module._parameters)


@dataclass(frozen=True, slots=True)
class _SavedPart:
    """Outputs ``[start, end)`` of one expert, which a checkpoint holds as a matrix of that name."""

    name: str
    expert: int
    start: int
    end: int


def _saved_parts(
    model: PreTrainedModel, found: Mapping[str, nn.Module]
) -> dict[str, list[_SavedPart]]:
    """What transformers saves the experts' parameters as, where that is a matrix for each expert.

    It converts them by rules of its own; so it is given the rows' numbers in place of the weights.
    """
    numbers: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for path, module in found.items():
        for key in (_first(module), LAST):
            if not _is_turned(module):
                n_experts, n_rows = module.get_parameter(key).shape[:2]
                numbers[f"{path}.{key}"] = torch.arange(n_experts * n_rows).view(-1, n_rows, 1)
                sizes[f"{path}.{key}"] = n_rows
    parts: dict[str, list[_SavedPart]] = {}
    for whole, rows in numbers.items():
        for name, saved in revert_weight_conversion(model, {whole: rows}).items():
            for matrix, own in _matrices(name, saved):
                part = _part_of(matrix, own.flatten().tolist(), sizes[whole])
                parts.setdefault(whole, []).extend(part)
    return parts


def _matrices(name: str, saved: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What an artifact calls the matrices of a tensor in a checkpoint, and the rows' numbers."""
    if saved.dim() == 2 and saved.shape[1] == 1:
        yield name, saved
    elif saved.dim() == 3 and saved.shape[2] == 1:
        yield from ((f"{name}[{index}]", own) for index, own in enumerate(saved))


def _part_of(name: str, rows: list[int], n_rows: int) -> list[_SavedPart]:
    """None if these rows are not neighbours in one expert's matrix."""
    expert, start = divmod(rows[0], n_rows)
    if rows != list(range(rows[0], rows[0] + len(rows))) or start + len(rows) > n_rows:
        return []
    return [_SavedPart(name, expert, start, start + len(rows))]


class _Maker:
    """Makes the parameters of experts and routers, and names them."""

    def __init__(
        self,
        parameters: dict[str, DeltaParameter],
        saved: Mapping[str, list[_SavedPart]],
        kernels: Kernels,
        residency: Residency,
    ) -> None:
        self._parameters, self._saved = parameters, saved
        self._kernels, self._residency = kernels, residency

    def whole(self, name: str, value: Tensor) -> WholeParameter:
        """A parameter or buffer whose values are each slot's own."""
        made = WholeParameter(name, value.detach(), self._kernels, self._residency)
        self._parameters[name] = made
        return made

    def product(self, module: nn.Module, path: str, key: str) -> ExpertsProduct:
        """One product of all experts: its matrices by both of their names."""
        name, weight = f"{path}.{key}", module.get_parameter(key).data
        turned = _is_turned(module)
        matrices = weight.transpose(1, 2) if turned else weight
        n_outputs = matrices.shape[1]
        saved: dict[tuple[int, int], list[_SavedPart]] = {(0, n_outputs): []}
        for part in self._saved.get(name, []):
            saved.setdefault((part.start, part.end), []).append(part)
        parts = []
        for (start, end), named in saved.items():
            rows, is_whole = matrices[:, start:end], end - start == n_outputs
            home = self._projection(name, rows)
            parts.append(ExpertsPart(home, slice(start, end)))
            names = [(f"{name}[{e}]", e) for e in range(len(rows))] if is_whole else []
            self._add_experts(names, rows, home, turned=turned, counted=is_whole)
            names = [(part.name, part.expert) for part in named]
            self._add_experts(names, rows, home, turned=turned, counted=False)
        _make_siblings([part.projection for part in parts[1:]])
        bias = None
        if getattr(module, "has_bias", False):
            bias = self.whole(f"{name}_bias", module.get_parameter(f"{key}_bias"))
        return ExpertsProduct(weight, parts, bias, turned=turned)

    def _projection(self, name: str, rows: Tensor) -> ExpertsProjection:
        return ExpertsProjection(name, rows[0], len(rows), self._kernels, self._residency)

    def _add_experts(
        self,
        names: list[tuple[str, int]],
        rows: Tensor,
        home: ExpertsProjection,
        *,
        turned: bool,
        counted: bool,
    ) -> None:
        for name, expert in names:
            self._parameters[name] = ExpertParameter(
                name, rows[expert], home, expert, turned=turned, counted=counted
            )


def _make_siblings(projections: list[ExpertsProjection]) -> None:
    """The gate's and the up's read one x."""
    for projection in projections:
        projection.siblings = tuple(projections)
