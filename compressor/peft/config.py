"""``adapter_config.json`` of a PEFT adapter: what is understood, and what is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, UnsupportedTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Settings under which the adapter means something other than W + scaling * B A.
_MUST_BE_OFF = (
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "megatron_config",
    "arrow_config",
    "use_bdlora",
    "velora_config",
    "kappa_tuner_config",
)
# Initialisations that also change the base's weights; without them the adapter is meaningless.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Ranks and scalings of an adapter, by module."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    is_dora: bool

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of ``B A`` in a module whose factors have `rank`."""
        declared = self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)
        if declared != rank:
            raise CheckpointError(
                f"{CONFIG_FILE} gives {module} rank {declared}, the factors have {rank}"
            )
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def is_adapter(path: str | Path) -> bool:
    """Tell an adapter directory from a model's."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_settings(path: Path) -> LoraSettings:
    """Read an adapter's settings. Raises CheckpointError, or UnsupportedTensor naming one."""
    try:
        config = json.loads((path / CONFIG_FILE).read_bytes())
        kind = str(config.get("peft_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE} cannot be read: {error}") from error
    if kind != "LORA":
        raise UnsupportedTensor(
            f"{path}: peft_type {kind} is not supported, only LORA. Merge it into the base "
            "(merge_and_unload, save_pretrained) and compress the result as a full fine-tune"
        )
    _check_plain(path, config)
    try:
        return LoraSettings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            rank_stabilised=bool(config.get("use_rslora", False)),
            is_dora=bool(config.get("use_dora", False)),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: unusable setting {error!r}") from error


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    found = [key for key in _MUST_BE_OFF if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        found.append(f"init_lora_weights = {start}")
    if found:
        raise UnsupportedTensor(
            f"{path}: {found[0]} makes the adapter more than low-rank factors. Merge it into the "
            "base (merge_and_unload, save_pretrained) and compress the result as a full fine-tune"
        )


def _pattern(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's `get_pattern_key`: the first pattern that matches the end of the module's path."""
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error as error:
            raise CheckpointError(f"{CONFIG_FILE}: pattern {pattern!r}: {error}") from error
    return module
