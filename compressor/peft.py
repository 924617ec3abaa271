"""Import a PEFT LoRA adapter: its factors become `lowrank` terms, exactly; nothing is re-fitted.

Conventions of PEFT (its `lora/layer.py`): ``dW = scaling * B A`` with ``A [r, in]``, ``B [out, r]``
for Linear and Conv1D alike; for Embedding ``dW = scaling * (B A)^T`` with ``A [r, vocabulary]``,
``B [width, r]``; scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import Checkpoint, TensorFiles
from compressor.codecs import DenseRows, LowRankTerm, TensorDelta, lowrank_from_factors
from compressor.errors import CheckpointError, UnsupportedTensor
from compressor.hub import cached_ref
from compressor.layout import Layout, Parameter, read_layout

CONFIG_FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Settings under which the adapter means something other than W + scaling * B A.
_MUST_BE_OFF = (
    "use_dora",
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

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>A|B)(\.[^.]+)?\.weight$")
_EMBEDDING = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<part>A|B)(\.[^.]+)?$")


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool

    def scaling(self, module: str, rank: int) -> float:
        declared = self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)
        if declared != rank:
            raise CheckpointError(
                f"{CONFIG_FILE} gives {module} rank {declared}, the factors have {rank}"
            )
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


class Adapter(TensorFiles):
    """A LoRA adapter directory, opened and checked. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = _read_settings(path)
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(
                f"{path}: {WEIGHTS} is missing; an adapter_model.bin is a pickle: convert it once "
                "where you trust it with peft, PeftModel.from_pretrained(base, dir)"
                ".save_pretrained(out)"
            )
        ref = cached_ref(path)
        super().__init__(ref.repo if ref else path.resolve().name, [path / WEIGHTS])

    def deltas(self, base: Checkpoint) -> Iterator[TensorDelta]:
        """Yield the delta of every parameter the adapter changes, in the model's order.

        Raises UnsupportedTensor or CheckpointError naming what does not fit `base`.
        """
        layout = read_layout(base.path)
        keys = layout.keys(base.tensors, base.name)
        parts: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            if ".original_module." not in key:  # PEFT's untouched copy of a module saved whole
                name, part = _target(layout, key)
                parts.setdefault(name, {})[part] = key
        self._check_ties(layout, parts)
        for name, parameter in layout.parameters.items():
            if name not in parts:
                continue
            delta = self._delta(parameter, parts[name], base, keys[name])
            if delta is not None:
                yield delta

    def _check_ties(self, layout: Layout, parts: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse what would untie: PEFT changes one module of a tied pair, a delta both."""
        for alias, target in layout.tied:
            first, second = parts.get(target, {}), parts.get(alias, {})
            if first.keys() == second.keys() == {"full"} and torch.equal(
                self.rows(first["full"]), self.rows(second["full"])
            ):
                continue
            if first or second:
                raise UnsupportedTensor(
                    f"{alias if second else target}: the adapter changes it, but in the base "
                    f"{alias} is tied to {target}; a delta cannot untie them"
                )

    def _delta(
        self, parameter: Parameter, parts: Mapping[str, str], base: Checkpoint, base_key: str
    ) -> TensorDelta | None:
        if parts.keys() == {"full"}:
            return self._exact(parameter, parts["full"], base, base_key)
        a, b = self._factors(parameter, parts)
        rows, exact = parameter.shape[0], None
        if "full" in parts:
            exact = self._added_rows(parameter, parts["full"], base, base_key, a, b)
        if b.shape[1] != rows + (0 if exact is None else len(exact.values)):
            raise self._misfit(parameter)
        kept = b[:, :rows].contiguous()
        # B starts at zero: then this module was never trained.
        terms = (_lossless(a, kept),) if bool(a.any()) and bool(kept.any()) else ()
        if not terms and exact is None:
            return None
        return TensorDelta(
            name=parameter.name,
            shape=(b.shape[1], *parameter.shape[1:]),
            base_shape=parameter.shape,
            transposed=parameter.transposed,
            terms=terms,
            exact=exact,
        )

    def _factors(self, parameter: Parameter, parts: Mapping[str, str]) -> tuple[Tensor, Tensor]:
        """Return ``a [r, n]`` and ``b [r, m]`` float32, the scaling in b."""
        if parts.keys() - {"full"} not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise UnsupportedTensor(
                f"{parameter.name}: the adapter holds {', '.join(sorted(parts))} for it; exactly "
                "one pair of LoRA factors is needed"
            )
        if "A" in parts:
            a, b = self.rows(parts["A"]).float(), self.rows(parts["B"]).float().T
        else:
            a = self.rows(parts["embedding_B"]).float().T
            b = self.rows(parts["embedding_A"]).float()
        if a.ndim != 2 or a.shape[0] != b.shape[0] or a.shape[1] != parameter.shape[1]:
            raise self._misfit(parameter)
        module = parameter.name.removesuffix(".weight")
        return a.contiguous(), b * self.settings.scaling(module, a.shape[0])

    def _misfit(self, parameter: Parameter) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: the factors of {parameter.name} do not fit its shape "
            f"{list(parameter.shape)}; is this the right base?"
        )

    def _added_rows(
        self, parameter: Parameter, key: str, base: Checkpoint, base_key: str, a: Tensor, b: Tensor
    ) -> DenseRows | None:
        """Rows a resized embedding has beyond the base's, with their share of the factors.

        PEFT saves the weight under the factors of an embedding or lm_head as well; its first
        rows must be the base's.
        """
        rows, under = parameter.shape[0], self.rows(key)
        if under.shape[1:] != parameter.shape[1:] or under.shape[0] < rows:
            raise self._misfit(parameter)
        if _first_difference(base.rows(base_key), under) != rows:
            raise UnsupportedTensor(
                f"{parameter.name}: the weight saved under the adapter's factors is not the "
                "base's; is this the right base?"
            )
        if under.shape[0] == rows:
            return None
        values = under[rows:].float() + b[:, rows : under.shape[0]].T @ a
        return DenseRows(rows, values.to(under.dtype))

    def _exact(
        self, parameter: Parameter, key: str, base: Checkpoint, base_key: str
    ) -> TensorDelta | None:
        """A module saved whole: stored exactly, from its first row that differs."""
        ours, theirs = base.rows(base_key), self.rows(key)
        if parameter.transposed:
            ours, theirs = ours.T, theirs.T
        grown = theirs.ndim == ours.ndim and theirs.shape[1:] == ours.shape[1:]
        if not grown or theirs.shape[0] < ours.shape[0]:
            raise CheckpointError(
                f"{self.name}: {parameter.name} has shape {list(theirs.shape)}, the base "
                f"{list(ours.shape)}"
            )
        start = _first_difference(ours, theirs)
        if start == theirs.shape[0]:
            return None
        if theirs.ndim == 1:
            start = 0
        return TensorDelta(
            name=parameter.name,
            shape=tuple(theirs.shape),
            base_shape=parameter.shape,
            transposed=parameter.transposed,
            terms=(),
            exact=DenseRows(start, theirs[start:].contiguous()),
        )


def is_adapter(path: str | Path) -> bool:
    """Tell an adapter directory from a model's."""
    return (Path(path) / CONFIG_FILE).is_file()


def _read_settings(path: Path) -> _Settings:
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
        return _Settings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            rank_stabilised=bool(config.get("use_rslora", False)),
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


def _target(layout: Layout, key: str) -> tuple[str, str]:
    """Return the parameter a stored tensor belongs to, and which part of its delta it is."""
    path = key.removeprefix("base_model.model.")
    if match := _FACTOR.match(path):
        wanted, part = f"{match['module']}.weight", match["part"]
    elif match := _EMBEDDING.match(path):
        wanted, part = f"{match['module']}.weight", f"embedding_{match['part']}"
    else:
        wanted, part = re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", path), "full"
    name = layout.find(wanted)
    if name is None:
        raise UnsupportedTensor(f"{key}: the base has no parameter {wanted} for it")
    parameter = layout.parameters.get(name)
    if part != "full" and parameter and parameter.kind not in ("linear", "embedding"):
        raise UnsupportedTensor(f"{name}: LoRA factors on a module that is no linear or embedding")
    return name, part


def _lossless(a: Tensor, b: Tensor) -> LowRankTerm:
    """16-bit factors if those are exact (a bfloat16 adapter's mostly are), else 32-bit ones."""
    small = lowrank_from_factors(a, b, 16)
    if torch.equal(small.a, a) and torch.equal(small.b, b):
        return small
    return lowrank_from_factors(a, b, 32)


def _first_difference(ours: Tensor, theirs: Tensor) -> int:
    differs = ours.float() != theirs[: ours.shape[0]].float()
    rows = differs.reshape(differs.shape[0], -1).any(-1).nonzero()
    return int(rows[0]) if len(rows) else ours.shape[0]


def _pattern(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's `get_pattern_key`: the first pattern that matches the end of the module's path."""
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error as error:
            raise CheckpointError(f"{CONFIG_FILE}: pattern {pattern!r}: {error}") from error
    return module
