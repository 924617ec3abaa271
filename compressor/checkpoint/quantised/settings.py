"""What ``config.json`` says of weights that are stored quantised. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.errors import CheckpointError

# The second is what llm-compressor called it before transformers read its checkpoints.
KEYS = ("quantization_config", "compression_config")
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TRANSPOSING = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's weights are packed, checked as far as ``config.json`` tells.

    method   ``quant_method``, in lower case
    text     for people: ``gptq 4 bit``
    bits     of a weight, the fewest that any has
    dtype    what the weights are dequantised to, as safetensors spells it: the model's own dtype
    options  the rest of what ``quantization_config`` says
    """

    method: str
    text: str
    bits: int
    dtype: str
    options: Mapping[str, Any]


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """Return what a parsed ``config.json`` says; None if the weights are stored as they are.

    Raises CheckpointError for what this reader does not know.
    """
    found = next((config[key] for key in KEYS if config.get(key) is not None), None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError("config.json: quantization_config is no JSON object")
    method = str(found.get("quant_method", "")).lower()
    if method not in _KINDS:
        raise CheckpointError(
            f"config.json: the weights are quantised by {method or 'an unnamed method'!s:.40}, "
            f"which cannot be read ({', '.join(_KINDS)} can); give the 16- or 32-bit weights"
        )
    if (model_type := config.get("model_type")) in TRANSPOSING:
        raise CheckpointError(
            f"config.json: a {model_type} model stores its matrices turned round, and quantised "
            "ones of that kind cannot be read; give the 16- or 32-bit weights"
        )
    text, bits = _KINDS[method](found)
    return Quantisation(method, text, bits, _dtype(config), found)


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the dense model that a quantised checkpoint stands for."""
    return {key: value for key, value in config.items() if key not in KEYS}


def setting_of(options: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> Any:
    """Return one setting. Raises CheckpointError if it is none of those `allowed`."""
    value = options.get(key, default)
    if not any(type(value) is type(known) and value == known for known in allowed):
        known = ", ".join(map(str, allowed))
        raise CheckpointError(
            f"config.json: quantization_config has {key} {value!r:.40}, which cannot be read "
            f"({known} can); give the 16- or 32-bit weights"
        )
    return value


def group_size(options: Mapping[str, Any], default: int | None) -> int | None:
    """Return how many inputs share a scale; None for all of them (stored as -1)."""
    value = options.get("group_size", default)
    if value is None or value == -1:
        return None
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(
            f"config.json: quantization_config has group_size {value!r:.40}, which is no number "
            "of inputs"
        )
    return value


def block_size(options: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Return rows and columns that share a scale, or None if the settings name none."""
    value = options.get(key)
    if value is None:
        return None
    whole = isinstance(value, list | tuple) and len(value) == 2
    if not whole or not all(type(size) is int and 0 < size < 1 << 31 for size in value):
        raise CheckpointError(
            f"config.json: quantization_config has {key} {value!r:.40}, which is no pair of "
            "rows and columns"
        )
    return value[0], value[1]


def _dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (name := part.get(key)) is not None:
                if name not in _CODES:
                    raise CheckpointError(
                        f"config.json: {key} is {name!r:.40}; quantised weights are read as "
                        f"{', '.join(_CODES)}"
                    )
                return _CODES[name]
    return "BF16"


def _gptq(options: Mapping[str, Any]) -> tuple[str, int]:
    bits = setting_of(options, "bits", (2, 3, 4, 8), None)
    layout = "checkpoint_format" if "checkpoint_format" in options else "format"
    setting_of(options, layout, ("gptq", "gptq_v2"), "gptq")
    setting_of(options, "pack_dtype", ("int32",), "int32")
    setting_of(options, "is_marlin_format", (False,), False)
    group_size(options, 128)
    return f"gptq {bits} bit", bits


def _awq(options: Mapping[str, Any]) -> tuple[str, int]:
    bits = setting_of(options, "bits", (4,), 4)
    layout = "version" if "version" in options else "format"
    if isinstance(options.get(layout), str):
        options = {**options, layout: options[layout].lower()}  # AutoAWQ writes GEMM
    setting_of(options, layout, ("gemm",), "gemm")
    setting_of(options, "zero_point", (True,), True)
    group_size(options, 128)
    return f"awq {bits} bit", bits


def _fp8(options: Mapping[str, Any]) -> tuple[str, int]:
    block_size(options, "weight_block_size")
    return "fp8", 8


def _bitsandbytes(options: Mapping[str, Any]) -> tuple[str, int]:
    if options.get("load_in_8bit", options.get("_load_in_8bit")) is True:
        return "bitsandbytes 8 bit", 8
    kind = setting_of(options, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    return f"bitsandbytes {kind}", 4


def _compressed_tensors(options: Mapping[str, Any]) -> tuple[str, int]:
    if options.get("transform_config"):
        raise CheckpointError(
            "config.json: the weights were rotated before they were quantised (transform_config), "
            "which cannot be read; give the 16- or 32-bit weights"
        )
    sparsity = options.get("sparsity_config") or {}
    setting_of(sparsity, "format", ("dense",), "dense")
    kinds, sizes = set(), []
    for args in group_weights(options):
        kind = setting_of(args, "type", ("int", "float"), "int")
        bits = setting_of(args, "num_bits", (8,) if kind == "float" else (2, 4, 8), 8)
        setting_of(args, "strategy", ("tensor", "channel", "group", "block"), "tensor")
        block_size(args, "block_structure")
        kinds.add(f"{kind}{bits}")
        sizes.append(bits)
    return f"compressed-tensors {'/'.join(sorted(kinds))}", min(sizes)


def group_weights(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of weights that a compressed-tensors configuration has, one per group."""
    return [args for _, args in weight_groups(options)]


def weight_groups(options: Mapping[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Each group of a compressed-tensors configuration: which modules, and how their weights are.

    Raises CheckpointError if there is none, or if they are not what the format says.
    """
    groups = options.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        args = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        if args is None:
            continue  # activations only
        if not isinstance(args, dict) or not isinstance(targets, list):
            raise CheckpointError("config.json: a group of config_groups does not parse")
        found.append(([str(target) for target in targets], args))
    if not found:
        raise CheckpointError(
            "config.json: quantization_config has no config_groups that say how weights are stored"
        )
    return found


def _mxfp4(options: Mapping[str, Any]) -> tuple[str, int]:
    return "mxfp4", 4


def _fbgemm_fp8(options: Mapping[str, Any]) -> tuple[str, int]:
    return "fbgemm fp8", 8


# By method: what its settings say, for people, and bits of a weight.
_KINDS: dict[str, Callable[[Mapping[str, Any]], tuple[str, int]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
