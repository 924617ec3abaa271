"""How a checkpoint stores the parameters of a model: under its names, or converted.

What becomes of a stored tensor when a model is loaded is transformers' to say: its conversion
mapping renames tensors, and joins or splits some (experts, the convolutions of q, k and v, gated
projections). The mapping is asked for every stored name, as loading asks it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.headers import slice_name
from compressor.checkpoint.parameter import Kind, Parameter, storable_shape

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# What wrappers of a model put before or into its names: torch.compile, FSDP, activation
# checkpointing; DataParallel, DDP and DeepSpeed.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"^(module\.)+")


@dataclass(slots=True)
class StoredForm:
    """The parameters of a model as its checkpoint stores them.

    parameters  those of the model; converted ones replaced by what is stored instead, 3-D ones by
                one matrix per expert
    renamed     checkpoint name -> parameter, where they differ
    stacked     3-D parameters stored as they are -> number of experts
    unwrapped   checkpoint names that carry a wrapper's prefix
    """

    parameters: list[Parameter] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, int] = field(default_factory=dict)
    unwrapped: list[str] = field(default_factory=list)

    def add(self, parameter: Parameter) -> None:
        """Take a parameter, or each of its experts."""
        if parameter.kind != "experts":
            self.parameters.append(parameter)
            return
        count, *rest = parameter.shape
        self.stacked[parameter.name] = count
        self.parameters.extend(
            replace(
                parameter, name=slice_name(parameter.name, index), kind="linear", shape=tuple(rest)
            )
            for index in range(count)
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stored tensor goes.

    targets     parameters it becomes, or becomes a part of
    normal      its name after transformers' renaming, before any conversion
    converted   whether more than the name changes
    """

    targets: tuple[str, ...]
    normal: str
    converted: bool


def saved_tensors(model: Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' `save_pretrained` writes for `tensors`, given by the model's names.

    Empty if it cannot turn the conversion round.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return dict(revert_weight_conversion(model, dict(tensors)))
    except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError):
        return {}


class Conversions:
    """transformers' mapping from stored names to the parameters of `model`.

    known   names that the model has, tied aliases included
    prefix  of the inner model, which may be left out or be too much
    """

    def __init__(self, model: Module, known: Collection[str], prefix: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        found: list[Any] = get_model_conversion_mapping(model)
        self._model, self._known, self._prefix = model, known, prefix
        self._tensors = model.state_dict()
        self._renamings = [each for each in found if not isinstance(each, WeightConverter)]
        self._converters = [each for each in found if isinstance(each, WeightConverter)]

    def place(self, key: str) -> _Place | None:
        """Return where the tensor stored as `key` goes; None if the model does not load it."""
        normal = key
        for renaming in self._renamings:
            normal, _ = renaming.rename_source_key(normal)
        for converter in self._converters:
            name, pattern = converter.rename_source_key(normal)
            if pattern is None:
                continue
            first, *others = converter.target_patterns
            names = (name, *(_swapped(name, first, other) for other in others))
            targets = tuple(filter(None, map(self._with_prefix, names)))
            if len(targets) == len(names):
                return _Place(targets, normal, True)
            break
        for name in (normal, key):
            if (target := self._with_prefix(name)) is not None:
                return _Place((target,), normal, False)
        return None

    def stored(self, targets: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that transformers' `save_pretrained` writes for these parameters.

        Empty if it cannot turn the conversion round.
        """
        saved = saved_tensors(self._model, {name: self._tensors[name] for name in targets})
        return {name: tuple(part.shape) for name, part in saved.items()}

    def _with_prefix(self, name: str) -> str | None:
        inner = name.removeprefix(f"{self._prefix}.")
        tries = (name, f"{self._prefix}.{name}", inner)
        return next((each for each in tries if each in self._known), None)


def _swapped(name: str, old: str, new: str) -> str:
    """The name of a converter's other result: the last place of its first pattern exchanged."""
    head, found, tail = name.rpartition(old)
    return f"{head}{new}{tail}" if found else ""


def stored_form(
    model: Module,
    parameters: Iterable[Parameter],
    aliases: Collection[str],
    names: Iterable[str],
    prefix: str,
    optional: Collection[str] = (),
) -> StoredForm:
    """Describe a checkpoint that stores the tensors `names`.

    aliases   of tied parameters
    optional  parameters that the model makes itself where they are not stored: buffers

    What else is not stored in any form is left as the model has it; `Layout.keys` then names the
    tensor.
    """
    by_name = {parameter.name: parameter for parameter in parameters}
    conversions = Conversions(model, by_name.keys() | set(aliases), prefix)
    form = StoredForm()
    converted: dict[tuple[str, ...], dict[str, str]] = {}
    direct = set()
    for key in names:
        place = conversions.place(key)
        if place is None and (bare := _unwrapped(key)) != key:
            place = conversions.place(bare)
            if place is not None:
                form.unwrapped.append(key)
        if place is None:
            continue
        if place.converted:
            converted.setdefault(place.targets, {})[place.normal] = key
            continue
        (target,) = place.targets
        direct.add(target)
        if key not in (target, target.removeprefix(f"{prefix}.")):
            form.renamed[key] = target
    made: dict[str, list[Parameter]] = {}
    for targets, keys in converted.items():
        if direct.isdisjoint(targets):
            parts = _parts(conversions, [by_name[name] for name in targets], keys, form, prefix)
            made |= {name: [] for name in targets}
            made[targets[0]] = parts
    for name, parameter in by_name.items():
        if name in optional and name not in direct and name not in made:
            continue
        for part in made.get(name, [parameter]):
            form.add(part)
    return form


def _parts(
    conversions: Conversions,
    targets: list[Parameter],
    keys: dict[str, str],
    form: StoredForm,
    prefix: str,
) -> list[Parameter]:
    """What is stored in place of `targets`; names that differ are added to ``form.renamed``.

    keys  names in the checkpoint by their normal name
    """
    stored = conversions.stored([parameter.name for parameter in targets])
    if not stored:
        return targets
    parts = []
    for name, shape in stored.items():
        place = conversions.place(name)
        key = name if place is None else keys.get(place.normal, name)
        if key not in (name, name.removeprefix(f"{prefix}.")):
            form.renamed[key] = name
        kind = _kind_of_part(targets[0].kind, shape)
        # As it is stored: a conversion may turn experts round, which their module does not tell.
        turned = targets[0].transposed and targets[0].kind != "experts"
        parts.append(
            replace(
                targets[0], name=name, kind=kind, shape=storable_shape(shape), transposed=turned
            )
        )
    return parts


def _kind_of_part(kind: Kind, shape: tuple[int, ...]) -> Kind:
    """What a part is whose whole is of `kind`."""
    if len(shape) == 1:
        return "vector"
    if len(shape) == 2:
        return (
            "linear" if kind in ("linear", "experts") else kind if kind == "embedding" else "table"
        )
    return "experts" if kind == "experts" else "other"


def _unwrapped(key: str) -> str:
    return _OUTER.sub("", _WRAPPERS.sub("", key))
