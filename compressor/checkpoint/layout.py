"""What every parameter of an architecture is: linear, embedding, vector, ... or nothing we encode.

The answer comes from the model's own modules, built on the meta device (no memory, no weights),
never from guessing by names.

Mixture-of-experts weights: transformers keeps all experts of a layer in one tensor
``[experts, out, in]``. Checkpoints hold either that tensor or, as Mixtral's and Qwen's do, one
matrix per expert under other names, which are converted on loading (`stored_form`).
Either way a delta has one matrix per expert: of a stored 3-D tensor ``X`` they are called ``X[0]``,
``X[1]``, ...
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.headers import FLOATS, slice_name
from compressor.checkpoint.model_class import language_model
from compressor.checkpoint.parameter import Kind, Parameter, describe_parameter
from compressor.checkpoint.quantised.index import dense_tensors
from compressor.checkpoint.quantised.settings import KEYS
from compressor.checkpoint.stored_form import stored_form
from compressor.errors import CheckpointError, UnsupportedTensor

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["Kind", "Layout", "Parameter", "read_layout"]

# Masks and tables that old checkpoints carry and that the model computes for itself.
_COMPUTED = (
    r"\.rotary_emb\.inv_freq$",
    r"(^|\.)attn\.(masked_)?bias$",
    r"\.attention\.masked_bias$",
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of one architecture.

    parameters  by name, in the model's order; of tied ones only the one that is stored
    tied        (alias, stored name) pairs
    prefix      of the inner model (``model``, ``transformer``): checkpoints of the bare model
                leave it out
    ignored     patterns of checkpoint names that are not parameters
    masks       tensors of this checkpoint that hold no floats and that the model does not have
    renamed     checkpoint name -> parameter, where transformers renames on loading
    stacked     3-D tensors -> number of experts, whose matrices are the parameters
    unwrapped   checkpoint names with the prefix of a wrapper (``_orig_mod.``)
    borrowed    parameters that a fine-tune has untied -> those whose value the base has for them
    """

    parameters: dict[str, Parameter]
    tied: tuple[tuple[str, str], ...]
    prefix: str
    ignored: tuple[str, ...]
    renamed: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, int] = field(default_factory=dict)
    masks: frozenset[str] = frozenset()
    unwrapped: tuple[str, ...] = ()
    borrowed: dict[str, str] = field(default_factory=dict)

    def with_untied(self, aliases: Collection[str]) -> Layout:
        """Return a layout in which these tied aliases are parameters of their own."""
        borrowed = {alias: target for alias, target in self.tied if alias in aliases}
        own = {a: replace(self.parameters[t], name=a) for a, t in borrowed.items()}
        tied = tuple(pair for pair in self.tied if pair[0] not in borrowed)
        return replace(self, parameters=self.parameters | own, tied=tied, borrowed=borrowed)

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
                        f"{owner}: {place} and {found[part]} are the same parameter; save the "
                        "model again with save_pretrained, which writes it once"
                    )
                found[part] = place
        for name in self.parameters:
            if name in found:
                continue
            if name in self.borrowed:
                continue
            pairs = (*self.tied, *self.borrowed.items())
            alias = next((a for a, target in pairs if target == name and a in found), None)
            if alias is None:
                raise CheckpointError(
                    f"{owner}: tensor {name} is missing from the checkpoint; give the whole one, "
                    "as save_pretrained writes it"
                )
            found[name] = found[alias]  # only the tied twin was saved
        return found | {name: found[target] for name, target in self.borrowed.items()}

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
        if key in self.masks or any(re.search(pattern, key) for pattern in self.ignored):
            return None
        raise UnsupportedTensor(
            f"{key}: the architecture has no parameter of that name, and transformers does not "
            "load it under that name either; save the model itself, out of any wrapper, with "
            "save_pretrained (do not load this checkpoint for that: what is not found starts at "
            "random)"
        )


def transformers_config(path: Path) -> Any:
    """Return transformers' configuration of a model, as if its weights were not quantised."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for key in KEYS:
        if hasattr(config, key):
            delattr(config, key)
    return config


def read_layout(path: Path) -> Layout:
    """Build the architecture of the model in `path` on the meta device and describe it."""
    stored = dense_tensors(path)
    model = empty_model(path)
    tied = tuple(sorted((model.all_tied_weights_keys or {}).items()))
    aliases = {alias for alias, _ in tied}
    parameters, buffers = _parameters(model, aliases)
    prefix = model.base_model_prefix
    form = stored_form(model, parameters, aliases, stored, prefix, buffers)
    derived = (name for name, _ in model.named_buffers() if name not in buffers)
    layout = Layout(
        parameters={p.name: p for p in form.parameters},
        tied=tied,
        prefix=prefix,
        ignored=(
            *_COMPUTED,
            *(rf"(^|\.){re.escape(name)}$" for name in derived),
            *(model._keys_to_ignore_on_load_unexpected or ()),
        ),
        renamed=form.renamed,
        stacked=form.stacked,
        unwrapped=tuple(form.unwrapped),
    )
    masks = {
        name
        for name, tensor in stored.items()
        if tensor.dtype not in FLOATS and layout.find(name) is None
    }
    return replace(layout, masks=frozenset(masks))


def empty_model(path: Path) -> Any:
    """The language model that config.json describes, on the meta device: no weights."""
    import torch

    file = path / "config.json"
    try:
        kind, config = language_model(transformers_config(path))
        with torch.device("meta"):
            return kind._from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{file}: transformers cannot build a language model from it ({first[:200]}); correct "
            "it, or install the release of transformers that wrote it"
        ) from error


def _parameters(model: Module, aliases: set[str]) -> tuple[list[Parameter], set[str]]:
    """Parameters and persistent buffers, and which of them are buffers."""
    found: list[Parameter] = []
    buffers = set()
    for prefix, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        kept = {n: b for n, b in module.named_buffers(recurse=False) if n not in passing}
        for part, tensor in (*module.named_parameters(recurse=False), *kept.items()):
            name = f"{prefix}.{part}" if prefix else part
            if name in aliases:
                continue
            found.append(describe_parameter(name, part, module, tensor))
            if part in kept:
                buffers.add(name)
    return found, buffers
