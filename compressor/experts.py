"""Mixture-of-experts weights: what a checkpoint stores for the 3-D tensors a model holds.

transformers keeps all experts of a layer in one tensor ``[experts, out, in]``. Checkpoints hold
either that tensor or, as Mixtral's and Qwen's do, one matrix per expert under other names, which
are converted on loading. Either way a delta has one matrix per expert: of a stored 3-D tensor
``X`` they are called ``X[0]``, ``X[1]``, ...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compressor.checkpoint import slice_name

if TYPE_CHECKING:
    from torch.nn import Module

    from compressor.layout import Parameter


@dataclass(frozen=True, slots=True)
class StoredForm:
    """The parameters of a model as its checkpoint stores them.

    parameters  those of the model, 3-D ones replaced by one matrix per expert
    renamed     checkpoint name -> parameter, where they differ and the tensor does not
    stacked     3-D parameters stored as they are -> number of experts
    """

    parameters: list[Parameter]
    renamed: dict[str, str]
    stacked: dict[str, int]


def stored_form(
    model: Module, parameters: Iterable[Parameter], names: Iterable[str], prefix: str
) -> StoredForm:
    """Describe a checkpoint that stores the tensors `names`.

    What fits neither form is left as the model has it; `Layout.keys` then names the tensor.
    """
    known = {full for name in names for full in (name, f"{prefix}.{name}")}
    form = StoredForm([], {}, {})
    for parameter in parameters:
        stored = parameter.name
        if stored not in known:
            saved = _saved(model, parameter)
            if saved.keys() <= known and len(saved) > 1 and parameter.kind == "experts":
                form.parameters.extend(
                    replace(parameter, name=name, kind="linear", shape=shape)
                    for name, shape in saved.items()
                )
                continue
            if len(saved) == 1 and list(saved.values()) == [parameter.shape]:
                (stored,) = saved
                form.renamed[stored] = parameter.name
        if parameter.kind != "experts":
            form.parameters.append(parameter)
            continue
        form.stacked[parameter.name] = parameter.shape[0]
        form.parameters.extend(
            replace(
                parameter,
                name=slice_name(parameter.name, index),
                kind="linear",
                shape=parameter.shape[1:],
            )
            for index in range(parameter.shape[0])
        )
    return form


def _saved(model: Module, parameter: Parameter) -> dict[str, tuple[int, ...]]:
    """Names and shapes under which transformers' `save_pretrained` writes one parameter."""
    from transformers.core_model_loading import revert_weight_conversion

    tensor = model.get_parameter(parameter.name)
    saved = revert_weight_conversion(model, {parameter.name: tensor})
    return {name: tuple(part.shape) for name, part in saved.items() if part.ndim == 2} or {
        name: tuple(part.shape) for name, part in saved.items()
    }
