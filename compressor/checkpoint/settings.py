"""Settings of config.json that differ between a base and its fine-tune: which of them matter.

The configurations are compared as transformers resolves them, so that a default left out on one
side equals the same value written on the other. A setting stops the compression if it changes the
forward pass of inference, for a delta of the weights cannot express that. It does not where

* it is in one of the tables here, with the reason: the definition reads it, in training only, or
  what it sets does not enter the forward pass;
* no code of the architecture reads it: neither its definition nor what definitions share. Fields
  that only decide other fields (``max_window_layers``) are of this kind: what they decide is
  compared itself.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import empty_model, transformers_config
from compressor.errors import CheckpointError, InputError, UnsupportedTensor

if TYPE_CHECKING:
    from torch.nn import Module

# Where it came from, who wrote the file and how it is run: neither compared nor kept.
_OF_ONE_COPY = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "chunk_size_feed_forward",  # the same product in pieces
        "dtype",  # the tensors say it
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_word_embeddings",  # the tensors say it
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# A fine-tune may change these: kept in the delta and written by `impart reconstruct`.
_HARMLESS = {
    "attention_dropout": "training",
    "attn_pdrop": "training",
    "aux_loss_alpha": "a loss",
    "bos_token_id": "the tokenizer's and generation's",
    "embd_pdrop": "training",
    "eos_token_id": "the tokenizer's and generation's",
    "finetuning_task": "a label",
    "id2label": "labels",
    "initializer_factor": "new weights",
    "initializer_range": "new weights",
    "label2id": "labels",
    "max_position_embeddings": "a limit, unless the rotary embedding is scaled by it",
    "n_ctx": "a limit",
    "n_positions": "a limit; the rows of a table of positions are compared themselves",
    "neftune_noise_alpha": "noise in training",
    "num_labels": "labels",
    "output_router_logits": "a further output",
    "pad_token_id": "padding",
    "pretraining_tp": "the same product in pieces",
    "problem_type": "a loss",
    "rescale_prenorm_residual": "new weights",
    "resid_pdrop": "training",
    "router_aux_loss_coef": "a loss",
    "router_z_loss_coef": "a loss",
    "sep_token_id": "the tokenizer's",
    "seq_aux": "a loss",
    "summary_first_dropout": "training",
    "task_specific_params": "generation's",
    "unk_token_id": "the tokenizer's",
    "unsloth_fixed": "a mark",
    "unsloth_version": "a mark",
    "vocab_size": "the rows of the embeddings, which are compared themselves",
}
_DROPOUT = re.compile(r"(^|_)(dropout|drop_?out_(rate|prob|p)|pdrop|layerdrop|drop_path_rate)$")
# What definitions share and that reads the configuration.
_SHARED = (
    "transformers.modeling_rope_utils",
    "transformers.masking_utils",
    "transformers.cache_utils",
    "transformers.modeling_layers",
    "transformers.integrations.moe",
)


@dataclass(frozen=True, slots=True)
class ConfigChanges:
    """Settings of the fine-tune that differ from the base's.

    kept     do not change what is computed; a setting of a part (``text_config``) is in an object
             of that name
    ignored  would, but the user said to go on with the base's: the fine-tune's values by key
    """

    kept: dict[str, Any]
    ignored: dict[str, Any]


def compare_configs(
    base: Checkpoint, tuned: Checkpoint, ignore: Collection[str] = ()
) -> ConfigChanges:
    """Compare the configurations of two models.

    ignore  keys (``rope_theta``, ``text_config.rope_theta``) that may differ all the same

    Raises CheckpointError for another architecture, UnsupportedTensor for a setting that changes
    the computation, InputError for a key to ignore that does not differ.
    """
    ours, theirs = resolved_config(base), resolved_config(tuned)
    if ours.get("model_type") != theirs.get("model_type"):
        raise CheckpointError(
            f"{base.name} is a {ours.get('model_type')} model, {tuned.name} a "
            f"{theirs.get('model_type')}: not a base and its fine-tune; give the base that it "
            "was made from"
        )
    kept: dict[str, Any] = {}
    ignored: dict[str, Any] = {}
    source: _Source | None = None
    for path, before, value in _differences(ours, theirs):
        key, parent = path[-1], _parent(ours, path)
        if ".".join(path) in ignore:
            ignored[".".join(path)] = value
            continue
        if not _is_harmless(key, parent):
            source = source or _Source(empty_model(base.path))
            if source.reads(key):
                raise UnsupportedTensor(_refusal(path, before, value))
        place = kept
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[key] = value
    if unused := sorted(set(ignore) - ignored.keys()):
        raise InputError(
            f"--ignore-config {unused[0]}: this setting is the same in {base.name} and "
            f"{tuned.name}; leave it out"
        )
    return ConfigChanges(kept, ignored)


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the settings that a fine-tune changed."""
    changed = dict(config)
    for key, value in changes.items():
        whole = changed.get(key)
        is_part = _is_part(key) and isinstance(whole, dict) and isinstance(value, dict)
        changed[key] = with_changes(whole, value) if is_part and whole is not None else value
    return changed


def resolved_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json with the defaults filled in, so that files of different ages compare."""
    try:
        config: dict[str, Any] = transformers_config(checkpoint.path).to_dict()
    except (ValueError, KeyError, TypeError, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: not an architecture this transformers knows "
            f"({first[:200]}); install the release of transformers that wrote it"
        ) from error
    return config


class _Source:
    """The code that makes and runs a model."""

    def __init__(self, model: Module) -> None:
        names = {type(module).__module__ for module in model.modules()}
        names = {name for name in names if not name.startswith("torch.")} | set(_SHARED)
        files = {name: sys.modules[name] for name in names if name in sys.modules}
        self._text = "\n".join(inspect.getsource(module) for module in files.values())

    def reads(self, key: str) -> bool:
        """Whether the name stands anywhere in it."""
        return re.search(rf"\b{re.escape(key)}\b", self._text) is not None


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Settings that differ: where, and both values. An unset one equals None."""
    for key in sorted(ours.keys() | theirs.keys()):
        first, second = ours.get(key), theirs.get(key)
        if key in _OF_ONE_COPY or _as_float32(first) == _as_float32(second):
            continue
        if _is_part(key) and isinstance(first, dict) and isinstance(second, dict):
            yield from _differences(first, second, (*path, key))
        else:
            yield (*path, key), first, second


def _as_float32(value: object) -> object:
    """A setting as GGUF files keep it: 1e-6 and 9.99999997e-7 are one number there."""
    if isinstance(value, dict):
        return {key: _as_float32(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_float32(item) for item in value]
    return torch.tensor(value, dtype=torch.float32).item() if isinstance(value, float) else value


def _is_part(key: str) -> bool:
    """Whether a setting holds the configuration of a part of the model."""
    return key.endswith("_config") and key != "quantization_config"


def _parent(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    for part in path[:-1]:
        config = config[part]
    return config


def _is_harmless(key: str, config: Mapping[str, Any]) -> bool:
    if key == "max_position_embeddings":
        return not _scaled_rope(config)
    if key == "sliding_window":  # Qwen2 keeps a number that it does not use
        return config.get("use_sliding_window") is False
    return key in _HARMLESS or _DROPOUT.search(key) is not None


def _scaled_rope(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or {}
    return isinstance(rope, dict) and rope.get("rope_type", "default") != "default"


def _refusal(path: tuple[str, ...], ours: object, theirs: object) -> str:
    key = ".".join(path)
    return (
        f"config.json: {key} is {_short(ours)} in the base and {_short(theirs)} in the fine-tune; "
        "a delta of the weights cannot express that. If it may be the base's in what is served, "
        f"say so: --ignore-config {key}"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
