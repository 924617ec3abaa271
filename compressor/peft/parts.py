"""Which stored tensors of an adapter belong to which parameter of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import TensorIndex
from compressor.checkpoint.layout import Layout
from compressor.errors import UnsupportedTensor
from compressor.peft.config import AdapterSettings
from compressor.peft.experts import Share, TargetedParameters
from compressor.peft.factors import SHARED
from compressor.peft.keys import AdapterKey

Parts = Mapping[str, str]
"""Part of a parameter's change -> name of the tensor."""

# Parts that rescale the base's own rows or columns, which no factors can say.
RESCALING = frozenset({"magnitude", "ia3"})


@dataclass(frozen=True, slots=True)
class StoredParts:
    """By parameter: the tensors of its change, and what it has of factors that it shares."""

    parts: dict[str, Parts] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)


def stored_parts(
    keys: Mapping[str, AdapterKey],
    tensors: TensorIndex,
    settings: AdapterSettings,
    layout: Layout,
    base: Checkpoint,
) -> StoredParts:
    """Sort an adapter's tensors. Raises UnsupportedTensor for one that has no place in the base."""
    parts: dict[str, dict[str, str]] = {}
    shares: dict[str, Share] = {}
    common: dict[str, str] = {}
    targeted = TargetedParameters(base, settings.targets, layout) if settings.targets else None
    for key, entry in keys.items():
        if entry.part in SHARED:
            common[entry.part] = key
            continue
        own = _shares_of(key, entry, targeted)
        for name in own or [_target(layout, key, entry)]:
            parts.setdefault(name, {})[entry.part] = key
        shares |= own
        if (bias := _scaled_bias(layout, tensors, key, entry)) is not None:
            parts.setdefault(bias, {})["gain"] = key
    for name, found in parts.items():
        if any(part.startswith("vera_") for part in found):
            found.update(common)
        _check_dora(name, found, is_dora=settings.is_dora)
    return StoredParts({**parts}, shares)


def _shares_of(
    key: str, entry: AdapterKey, targeted: TargetedParameters | None
) -> dict[str, Share]:
    """What has a share in factors of a targeted parameter; empty if the tensor is no such."""
    if targeted is None or entry.part not in ("A", "B"):
        return {}
    name = targeted.find(entry.parameter.removesuffix(".weight"), entry.depth)
    if name is None:
        return {}
    shares = targeted.shares(name)
    if not shares:
        raise UnsupportedTensor(
            f"{key}: factors of {name}, which the base stores otherwise, by no rule that "
            "transformers has; load and save the base with transformers"
        )
    return shares


def _scaled_bias(layout: Layout, tensors: TensorIndex, key: str, entry: AdapterKey) -> str | None:
    """The bias that IA3 scales with the outputs of its layer."""
    if entry.part != "ia3" or tensors[key].shape[1:] != (1,):
        return None
    return layout.find(entry.parameter.removesuffix("weight") + "bias")


def _target(layout: Layout, key: str, entry: AdapterKey) -> str:
    """Return the parameter a stored tensor belongs to."""
    name = layout.find(entry.parameter)
    if name is None and entry.part == "added":
        raise UnsupportedTensor(
            f"{key}: lora_bias adds a bias to a layer that has none in the base, which no "
            "delta and no merged model can hold; train without lora_bias"
        )
    if name is None:
        raise UnsupportedTensor(
            f"{key}: the base has no parameter {entry.parameter} for it; give the base that the "
            "adapter was trained on"
        )
    parameter = layout.parameters.get(name)
    is_matrix = parameter is None or parameter.kind in ("linear", "embedding")
    if entry.part not in ("full", "added") and not is_matrix:
        raise UnsupportedTensor(
            f"{name}: LoRA factors on a module that is no linear or embedding; merge the adapter "
            "(merge_and_unload) and compress the result as a full fine-tune"
        )
    return name


def _check_dora(name: str, found: Parts, *, is_dora: bool) -> None:
    factors = {"A", "embedding_A"} & found.keys()
    if is_dora and factors and "magnitude" not in found:
        raise UnsupportedTensor(
            f"{name}: use_dora is set, but it has no magnitude vector; save the adapter again"
        )
    if "magnitude" in found and found.keys() - {"full"} != {"A", "B", "magnitude"}:
        raise UnsupportedTensor(
            f"{name}: lora_magnitude_vector is supported beside the factors of a linear "
            f"layer, found {', '.join(sorted(found))}; merge the adapter (merge_and_unload)"
        )
    if "magnitude" in found and not is_dora:
        raise UnsupportedTensor(
            f"{name}: lora_magnitude_vector, but use_dora is not set; save the adapter again"
        )
