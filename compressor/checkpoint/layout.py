"""What every parameter of an architecture is: linear, embedding, vector, ... or nothing we encode.

The answer comes from the model's own modules, built on the meta device (no memory, no weights),
never from guessing by names.

Mixture-of-experts weights: transformers keeps all experts of a layer in one tensor
``[experts, out, in]``. Checkpoints hold either that tensor or, as Mixtral's and Qwen's do, one
matrix per expert under other names, which are converted on loading. Either way a delta has one
matrix per expert: of a stored 3-D tensor ``X`` they are called ``X[0]``, ``X[1]``, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compressor.checkpoint.headers import slice_name, stored_names
from compressor.errors import CheckpointError, UnsupportedTensor

if TYPE_CHECKING:
    from torch.nn import Module

# table: a 2-D parameter of any other module (a router of experts), stored exactly like a vector;
# experts: 3-D, becomes one linear per expert; other: a convolution, say.
Kind = Literal["linear", "embedding", "vector", "table", "experts", "other"]

# Masks and tables that old checkpoints carry and that the model computes for itself.
_COMPUTED = (r"\.rotary_emb\.inv_freq$", r"(^|\.)attn\.(masked_)?bias$")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter as the model declares it.

    shape       in ``[out, in]`` orientation for matrices
    transposed  True if the checkpoint stores ``[in, out]`` (GPT-2's Conv1D)
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool
    module: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of one architecture.

    parameters  by name, in the model's order; of tied ones only the one that is stored
    tied        (alias, stored name) pairs
    prefix      of the inner model (``model``, ``transformer``): checkpoints of the bare model
                leave it out
    ignored     patterns of checkpoint names that are not parameters
    renamed     checkpoint name -> parameter, where transformers renames on loading
    stacked     3-D tensors -> number of experts, whose matrices are the parameters
    """

    parameters: dict[str, Parameter]
    tied: tuple[tuple[str, str], ...]
    prefix: str
    ignored: tuple[str, ...]
    renamed: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, int] = field(default_factory=dict)

    def keys(self, stored: Iterable[str], owner: str) -> dict[str, str]:
        """Map each parameter (and each tied alias stored too) to its name in the checkpoint.

        Raises UnsupportedTensor for a stored tensor that is no parameter, CheckpointError for a
        parameter that is not stored. `owner` names the checkpoint in messages.
        """
        found: dict[str, str] = {}
        for key in stored:
            name = self._parameter_name(key)
            if name is None:
                continue
            count = self.stacked.get(name)
            parts = {name: key}
            if count is not None:
                parts = {slice_name(name, i): slice_name(key, i) for i in range(count)}
            for part, place in parts.items():
                if part in found:
                    raise UnsupportedTensor(
                        f"{owner}: {place} and {found[part]} are the same parameter"
                    )
                found[part] = place
        for name in self.parameters:
            if name in found:
                continue
            alias = next((a for a, target in self.tied if target == name and a in found), None)
            if alias is None:
                raise CheckpointError(f"{owner}: tensor {name} is missing from the checkpoint")
            found[name] = found[alias]  # only the tied twin was saved
        return found

    def find(self, key: str) -> str | None:
        """Return the parameter, or the tied alias of one, that a checkpoint calls `key`."""
        aliases = dict(self.tied)
        for stored in (key, f"{self.prefix}.{key}"):
            name = self.renamed.get(stored, stored)
            if name in self.parameters or name in aliases or name in self.stacked:
                return name
        return None

    def stored_name(self, name: str) -> str:
        """Return what a checkpoint in this form calls a parameter or a 3-D tensor."""
        return next((key for key, found in self.renamed.items() if found == name), name)

    def _parameter_name(self, key: str) -> str | None:
        if (name := self.find(key)) is not None:
            return name
        if any(re.search(pattern, key) for pattern in self.ignored):
            return None
        raise UnsupportedTensor(
            f"{key}: the architecture has no parameter of that name, and transformers does not "
            "save it under that name either; load the model with transformers and save it again"
        )


def read_layout(path: Path) -> Layout:
    """Build the architecture of the model in `path` on the meta device and describe it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path / 'config.json'}: transformers cannot build a causal language model from it "
            f"({first[:200]})"
        ) from error
    tied = tuple(sorted((model.all_tied_weights_keys or {}).items()))
    prefix = model.base_model_prefix
    form = stored_form(
        model, _parameters(model, {alias for alias, _ in tied}), stored_names(path), prefix
    )
    return Layout(
        parameters={p.name: p for p in form.parameters},
        tied=tied,
        prefix=prefix,
        ignored=(*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())),
        renamed=form.renamed,
        stacked=form.stacked,
    )


def _parameters(model: Module, aliases: set[str]) -> list[Parameter]:
    found = []
    for prefix, module in model.named_modules():
        for part, tensor in module.named_parameters(recurse=False):
            name = f"{prefix}.{part}" if prefix else part
            if name not in aliases:
                found.append(_describe(name, part, module, tuple(tensor.shape)))
    return found


def _describe(name: str, part: str, module: Module, shape: tuple[int, ...]) -> Parameter:
    import torch
    from transformers.pytorch_utils import Conv1D

    kind: Kind = "other"
    transposed = False
    if len(shape) == 1:
        kind = "vector"
    elif len(shape) == 2 and part == "weight":
        if isinstance(module, torch.nn.Embedding):
            kind = "embedding"
        elif isinstance(module, torch.nn.Linear):
            kind = "linear"
        elif isinstance(module, Conv1D):
            kind, transposed = "linear", True
            shape = (shape[1], shape[0])
        else:
            kind = "table"
    elif len(shape) == 2:
        kind = "table"
    elif len(shape) == 3 and not isinstance(module, torch.nn.modules.conv._ConvNd):
        kind = "experts"
    return Parameter(name, kind, shape, transposed, type(module).__name__)


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
