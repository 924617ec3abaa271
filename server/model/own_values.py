"""Which parameters and buffers a definition reads itself, and who has to run by slot for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.deltas.whole import WholeParameter
from server.model.by_slot import BySlot, OwnValue, Split, split_of
from server.model.context import StepContext
from server.model.kv_store import KVStore
from server.model.observe import FORWARD, Method, Observation
from server.ops.kernels import Kernels

MOST_ELEMENTS = 1 << 20  # of one value: every fine-tune's is kept whole


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a module is in the model, and the names of what is its own."""

    path: str
    names: tuple[str, ...]


Owners = Mapping[nn.Module, Owner]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a product and nothing else."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)
    return any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)


def owners_in(model: nn.Module, ran: Collection[nn.Module]) -> Owners:
    """Modules with parameters or buffers of their own, all but embeddings and linears that run: the
    weight of one that does not may be read by the module around it (LongCat's router).
    """
    found = {}
    for path, module in model.named_modules():
        runs = is_plain_linear(module) and module in ran
        if not runs and not isinstance(module, nn.Embedding):
            names = tuple(name for name, value in own_values(module) if _is_small(value))
            if names:
                found[module] = Owner(path, names)
    return found


def own_values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters, and the buffers that a checkpoint has."""
    yield from module.named_parameters(recurse=False)
    passing = module._non_persistent_buffers_set
    yield from ((n, b) for n, b in module.named_buffers(recurse=False) if n not in passing)


def serve_own_values(
    owners: Owners,
    seen: Observation,
    parameters: dict[str, DeltaParameter],
    context: StepContext,
    store: KVStore,
    kernels: Kernels,
    residency: Residency,
) -> None:
    """Let every method that reads one run by slot, and enter in `parameters` those that then can be
    each variant's own. What is read by none that can run so stays out: no variant may change it.
    """
    splits: dict[tuple[nn.Module, str], Split | None] = {}
    values: dict[tuple[nn.Module, str], list[OwnValue]] = {}
    for module, owner in owners.items():
        for name in owner.names:
            full = f"{owner.path}.{name}".removeprefix(".")
            if full in parameters:
                continue
            frames = _readers(seen.reads.get((module, name), []), seen, splits)
            if not frames:
                continue
            base = dict(own_values(module))[name].detach()
            parameter = WholeParameter(full, base, kernels, residency)
            parameters[full] = parameter
            for frame in frames:
                values.setdefault(frame, []).append(OwnValue(module, name, parameter))
    for (module, method), read in values.items():
        split = splits[module, method]
        assert split is not None
        inner = getattr(module, method)
        vars(module)[method] = BySlot(inner, split, read, context, store)


def runs_by_slot(module: nn.Module) -> bool:
    """Whether its forward is `BySlot`: nothing else may take its place."""
    return isinstance(vars(module).get(FORWARD), BySlot)


def _readers(
    stacks: list[tuple[Method, ...]],
    seen: Observation,
    splits: dict[tuple[nn.Module, str], Split | None],
) -> set[tuple[nn.Module, str]]:
    """For every reading the innermost method around it that can run by slot; none at all if some
    reading has no such method.
    """
    found = set()
    for stack in stacks:
        for frame in reversed(stack):
            key = (frame.module, frame.method)
            if key not in splits:
                splits[key] = split_of(frame, seen)
            if splits[key] is not None:
                found.add(key)
                break
        else:
            return set()
    return found


def _is_small(value: Tensor) -> bool:
    return value.is_floating_point() and value.numel() <= MOST_ELEMENTS
