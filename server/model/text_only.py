"""Parts of a model that text does not reach: towers for images and sounds, what joins them on, and
attention to an encoder that is not there.

The server takes text alone. Such a part is taken out of the model, and its memory is free; whatever
a variant makes of its parameters, no answer is another, and nothing of them is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from compressor.checkpoint.headers import slice_name
from compressor.codecs.term import TensorDelta
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.residency import Residency
from server.model.observe import Observation
from server.model.own_values import Owners, own_values
from server.model.state import decoder_layers
from server.ops.kernels import Kernels


class AbsentPart(nn.Module):
    """In the place of such a part, of which some definitions ask where it is."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype


class UnreachedParameter(DeltaParameter):
    """One of such a part: of a delta nothing is kept."""

    def __init__(self, name: str, nothing: Tensor, kernels: Kernels, residency: Residency) -> None:
        """nothing: what says shape, dtype and device and takes no memory."""
        super().__init__(name, nothing, kernels, residency)
        self.vectors = None

    @property
    def holds_base(self) -> bool:
        return False

    @property
    def n_base_bytes(self) -> int:
        return 0

    def stage(self, delta: TensorDelta, *, without_terms: bool = False) -> StagedParameter:
        return StagedParameter(self)


@dataclass(slots=True)
class Unreached:
    """The parts that were taken out, by path, and what says of their values, by name, all but what
    they are (a single zero, expanded).
    """

    parts: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)  # tied -> a name that stays

    def add(self, name: str, value: Tensor) -> None:
        """An artifact may know what has three axes as matrices, one by one."""
        nothing = value.detach().new_zeros(()).expand(value.shape)
        self.values[name] = nothing
        if value.dim() == 3:
            self.values |= {slice_name(name, i): part for i, part in enumerate(nothing)}

    def add_saved(self, model: PreTrainedModel) -> None:
        """The names under which transformers saves them, where it converts them."""
        values = {n: torch.empty_like(v, device="meta") for n, v in self.values.items()}
        try:
            saved = revert_weight_conversion(model, values)
        except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError):
            return  # it cannot turn some conversion round: then they have no other names
        some = next(iter(self.values.values()), torch.zeros(()))
        for name in saved.keys() - self.values.keys():
            self.add(name, some.new_zeros(()).expand(saved[name].shape))

    def add_unread(self, model: PreTrainedModel, owners: Owners, seen: Observation) -> None:
        """What modules that run hold and do not read: marks between the parts of an image."""
        if not _takes_more_than_text(model):
            return
        layers = decoder_layers(model)
        for module, owner in owners.items():
            if any(owner.path == layer or owner.path.startswith(f"{layer}.") for layer in layers):
                continue
            for name in owner.names:
                full = f"{owner.path}.{name}".removeprefix(".")
                if not seen.reads.get((module, name)) and full not in self.shared:
                    self.add(full, dict(own_values(module))[name])

    def add_to(
        self, parameters: dict[str, DeltaParameter], kernels: Kernels, residency: Residency
    ) -> None:
        """Let variants have deltas of them. What has a parameter already keeps it."""
        for name, other in self.shared.items():
            if other in parameters:
                parameters.setdefault(name, parameters[other])
        for name, value in self.values.items():
            if name not in parameters:
                parameters[name] = UnreachedParameter(name, value, kernels, residency)


@contextmanager
def noting_modules(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Which modules run meanwhile."""
    ran: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.add(module))
        for module in model.modules()
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def take_out_unreached(
    model: PreTrainedModel, ran: Collection[nn.Module], probe: Callable[[], object]
) -> Unreached:
    """Take out what did not run when text was given, of a model that takes something else too.

    One of several in a list stays where another of them ran: an expert that was not chosen. So does
    everything if text cannot be given any more. Should such a part be wanted later after all, that
    is an error, not another answer.

    probe  gives the model text
    """
    found = Unreached()
    if not _takes_more_than_text(model):
        return found
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    found.parts = list(_unreached_paths(model, ran))
    found.shared = _shared_names(model, found.parts)
    if not found.parts:
        return found
    for path in found.parts:
        parent, _, name = path.rpartition(".")
        owner, part = model.get_submodule(parent), model.get_submodule(path)
        taken.append((owner, name, part))
        for inner, module in part.named_modules(prefix=path):
            for own_name, value in own_values(module):
                if f"{inner}.{own_name}" not in found.shared:
                    found.add(f"{inner}.{own_name}", value)
        setattr(owner, name, AbsentPart(model.device, model.dtype))
    found.add_saved(model)
    try:
        probe()
    except Exception:  # of a definition's own code, which may read what it does not run
        for owner, name, part in taken:
            setattr(owner, name, part)
        return Unreached(shared=found.shared)
    return found


def _shared_names(model: nn.Module, parts: Sequence[str]) -> dict[str, str]:
    """Names of parameters that have several, each with one outside these parts, if there is any:
    text reaches such a one by another way.
    """
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    inside = tuple(f"{part}." for part in parts)
    shared: dict[str, str] = {}
    for several in names.values():
        outside = [name for name in several if not name.startswith(inside)]
        if len(several) > 1 and outside:
            shared |= {name: next((n for n in outside if n != name), name) for name in several}
    return shared


def _takes_more_than_text(model: PreTrainedModel) -> bool:
    """It has a part for text, or attends to an encoder where there is one."""
    is_part = model.config.get_text_config() is not model.config
    return is_part or "encoder_hidden_states" in inspect.signature(model.forward).parameters


def _unreached_paths(model: nn.Module, ran: Collection[nn.Module]) -> Iterator[str]:
    """The outermost modules of which nothing ran."""
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            ran_too = [child for child in module.named_children() if _runs(child[1], ran)]
            waiting += [(f"{path}.{name}", child) for name, child in ran_too]
            continue
        for name, child in module.named_children():
            inner = f"{path}.{name}".removeprefix(".")
            if _runs(child, ran):
                waiting.append((inner, child))
            elif any(True for part in child.modules() for _ in own_values(part)):
                yield inner


def _runs(module: nn.Module, ran: Collection[nn.Module]) -> bool:
    return any(part in ran for part in module.modules())
