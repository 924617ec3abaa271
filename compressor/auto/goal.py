"""What `auto` is asked for, what it works with and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.artifact.config import DeltaConfig
from compressor.artifact.staging import StagedDeltas, StagedTensor
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import TensorPair
from compressor.encoders.codec import Codec
from compressor.errors import InputError

_FIRST_RATIO = 64.0  # where the search for a KL begins
_BELOW_BYTES = 0.99  # share of `max_bytes` that is planned for: what coding gains is an estimate


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked for; one of the three.

    ratio      fine-tune bytes / artifact bytes
    max_bytes  of the whole artifact
    max_kl     nats per token, on the user's texts or, without any, on the built-in ones
    """

    ratio: float | None = None
    max_bytes: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.ratio, self.max_bytes, self.max_kl)) != 1:
            raise InputError("give one of --ratio, --max-bytes and --max-kl")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise InputError(f"--max-bytes must be positive, got {self.max_bytes}")
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise InputError(f"--max-kl must be a positive number, got {self.max_kl}")

    def starting_ratio(self, finetuned_bytes: int) -> float:
        """Where to begin: what is asked for, unless that is a KL."""
        if self.max_bytes is not None:
            return max(1.0, finetuned_bytes / (self.max_bytes * _BELOW_BYTES))
        return self.ratio if self.ratio is not None else _FIRST_RATIO


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the pipeline lends `auto`.

    original  what differences are taken from: the base, or what it was quantised from
    pairs   what is to be stored
    config  the artifact's configuration before anything is encoded
    stage   encodes a tensor that has its settings into the staging folder, once
    tune    norms and biases of what is chosen, where the user's texts are enough for it
    """

    base: Checkpoint
    original: Checkpoint
    tuned: Checkpoint
    pairs: Sequence[TensorPair]
    companions: Mapping[str, bytes]
    config: DeltaConfig
    n_parameters: int
    stage: Callable[[TensorPair, Codec], StagedTensor]
    own_texts: Path | None = None
    device: str = "cpu"
    tune: bool = True


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `auto` settled on: the tensors with their settings, and how they are encoded."""

    pairs: list[TensorPair]
    deltas: StagedDeltas
    config: DeltaConfig
    notes: tuple[str, ...]
