"""``adapter_config.json`` of a PEFT adapter: what is understood, and what is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from compressor.errors import CheckpointError, UnsupportedTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Kinds whose change of the weights is kept exactly: factors, rows and values.
ACCEPTED = ("LORA", "ADALORA", "VERA", "LOHA", "LOKR", "IA3", "LN_TUNING", "TRAINABLE_TOKENS")
# Kinds that change what goes in, or choose by token: there are no weights that say the same.
_NOT_WEIGHTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
    "XLORA",
    "POLY",
)
# Settings under which a LoRA means something other than W + scaling * B A.
_MUST_BE_OFF = (
    "use_qalora",
    "layer_replication",
    "alora_invocation_tokens",
    "megatron_config",
    "arrow_config",
    "monteclora_config",
    "use_bdlora",
    "velora_config",
    "kappa_tuner_config",
)
# Initialisations that take a product out of the base's weights, which these determine.
_STARTS = ("pissa", "olora")
# Those that change the base by a draw, by data or by its quantisation: what they took out is lost.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MERGE = (
    "Merge it into the base (merge_and_unload, save_pretrained) and compress the result as a full "
    "fine-tune"
)


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What an adapter's configuration says of its tensors.

    kind       PEFT's name, one of `ACCEPTED`
    rank       of a module's factors, unless `rank_pattern` says another
    start      how the factors began, where PEFT then takes their product out of the base's weights
    targets    parameters that have factors, beside modules
    tokens     rows of the tokens that were trained, by the end of their module's name; under the
               empty name those of the input embedding
    """

    kind: str
    rank: int = 0
    alpha: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    is_dora: bool = False
    start: str = ""
    targets: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def scaling(self, module: str, rank: int | None) -> float:
        """Return the factor of the product in a module whose factors have `rank`, None if they do
        not tell.
        """
        if self.kind == "VERA":
            return 1.0
        if self.kind == "ADALORA":  # divided by the initial rank, however many are left
            return (self.alpha if self.alpha > 0 else self.rank) / (self.rank + 1e-5)
        declared = self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)
        if rank is None:
            rank = declared
        if declared != rank:
            raise CheckpointError(
                f"{CONFIG_FILE} gives {module} rank {declared}, the factors have {rank}"
            )
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def token_rows(self, module: str) -> tuple[int, ...] | None:
        """Return which rows of a module's weight were trained, None if that is not said."""
        for name, rows in self.tokens.items():
            if name and (module == name or module.endswith(f".{name}")):
                return rows
        return self.tokens.get("")


def is_adapter(path: str | Path) -> bool:
    """Tell an adapter directory from a model's."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_settings(path: Path) -> AdapterSettings:
    """Read an adapter's settings. Raises CheckpointError, or UnsupportedTensor naming one."""
    try:
        config = json.loads((path / CONFIG_FILE).read_bytes())
        kind = str(config.get("peft_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE} cannot be read: {error}") from error
    if kind not in ACCEPTED:
        _refuse_kind(path, kind)
    _check_plain(path, config)
    try:
        return AdapterSettings(
            kind=kind,
            rank=int(config.get("init_r", 0) if kind == "ADALORA" else config.get("r", 0) or 0),
            alpha=float(config.get("lora_alpha", config.get("alpha", 0)) or 0),
            # AdaLoRA's says which components are left, which the factors say too.
            rank_pattern={} if kind == "ADALORA" else dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            rank_stabilised=bool(config.get("use_rslora", False)),
            is_dora=bool(config.get("use_dora", False)),
            start=_start(config),
            targets=tuple(map(str, config.get("target_parameters") or ())),
            tokens=_tokens(config),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: unusable setting {error!r}") from error


def _refuse_kind(path: Path, kind: str) -> NoReturn:
    known = ", ".join(ACCEPTED)
    if kind in _NOT_WEIGHTS:
        raise UnsupportedTensor(
            f"{path}: peft_type {kind} is not supported: it changes no weight that a delta could "
            f"hold, and cannot be merged; train one of {known}, or a full fine-tune"
        )
    raise UnsupportedTensor(f"{path}: peft_type {kind} is not supported, only {known}. {_MERGE}")


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    found = [key for key in _MUST_BE_OFF if config.get(key)]
    start = _start(config)
    if start in _STARTS and config.get("use_dora"):
        found.append(f"use_dora with init_lora_weights = {start}")
    if start.startswith(_CHANGES_BASE) and start not in _STARTS:
        raise UnsupportedTensor(
            f"{path}: init_lora_weights = {start} has changed the base's weights in a way that the "
            "adapter does not tell. Save it as a plain LoRA where it was trained (save_pretrained "
            "with path_initial_model_for_weight_conversion). " + _MERGE
        )
    if found:
        raise UnsupportedTensor(
            f"{path}: {found[0]} makes the adapter more than low-rank factors. {_MERGE}"
        )


def _start(config: Mapping[str, Any]) -> str:
    start = config.get("init_lora_weights")
    is_plain = not isinstance(start, str) or not start.lower().startswith(_CHANGES_BASE)
    return "" if is_plain else str(start).lower()


def _tokens(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        return {"": _row_numbers(config["token_indices"])}
    given = config.get("trainable_token_indices") or {}
    if isinstance(given, Mapping):
        return {str(name): _row_numbers(rows) for name, rows in given.items()}
    return {"": _row_numbers(given)}


def _row_numbers(rows: Sequence[Any]) -> tuple[int, ...]:
    numbers = tuple(int(row) for row in rows)
    if len(set(numbers)) != len(numbers) or any(number < 0 for number in numbers):
        raise ValueError("token indices must be distinct and not negative")
    return numbers


def _pattern(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's `get_pattern_key`: the first pattern that matches the end of the module's path."""
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error as error:
            raise CheckpointError(f"{CONFIG_FILE}: pattern {pattern!r}: {error}") from error
    return module
