"""What to compress with, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.artifact.config import CODER, DeltaConfig
from compressor.auto.goal import Goal
from compressor.errors import InputError

AUTO = "auto"


DEFAULT_RATIO = 32.0


NO_CODER = "none"


_ON_GPU = (AUTO, "blockdiag", "lowrank")


@dataclass(frozen=True, slots=True)
class Options:
    """How to compress.

    codec          a name that `make_encoder` knows, or "auto"
    codec_options  for `make_encoder`; what is left out has the codec's default
    ratio          bytes of the fine-tune's safetensors files / bytes of the whole artifact
    max_bytes, max_kl  for auto, instead of the ratio: see `Goal`
    resume         take up an interrupted run with the same inputs and settings where it stopped
    base_name      what to call the base in the artifact (its Hub id); default: as given
    calibration    texts to measure KL and agreement on; auto also chooses by them, and codecs that
                   want their layers' inputs (GPTQ) take them, or else the built-in texts
    device         where to encode: "cpu" or "cuda"
    tune           auto, shown texts: tune norms and biases on those it does not measure on
    difference_from  the weights that a quantised base was made from, by path or Hub id: the
                   difference is the fine-tune's from these, and is applied to the base
    ignore_config  settings of config.json that may differ though they change the computation
    entropy        coder of the tensors on disk: "zstd" or "none"
    certificate    record what the fine-tune says to a few prompts, if it can be run here
    certificate_prompts  texts of the user's to take those from, which are then in the artifact
    """

    codec: str = "blockdiag"
    codec_options: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    max_bytes: int | None = None
    max_kl: float | None = None
    seed: int = 0
    overwrite: bool = False
    resume: bool = True
    base_name: str | None = None
    calibration: Path | None = None
    device: str = "cpu"
    tune: bool = True
    entropy: str = CODER
    ignore_config: tuple[str, ...] = ()
    difference_from: str | None = None
    certificate: bool = False
    certificate_prompts: Path | None = None

    def __post_init__(self) -> None:
        if self.entropy not in (CODER, NO_CODER):
            raise InputError(f"the entropy coder must be {CODER} or {NO_CODER}")
        if self.ratio is not None and not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise InputError(f"the ratio must be 1 or more, got {self.ratio:g}")
        if self.codec != AUTO and (self.max_bytes is not None or self.max_kl is not None):
            raise InputError("--max-bytes and --max-kl are for --codec auto; give a --ratio")
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"the device must be cpu or cuda, got {self.device}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("this torch sees no GPU; leave --device out")
        if self.device == "cuda" and self.codec not in _ON_GPU:
            raise InputError(f"{self.codec} encodes on the CPU only; leave --device out")
        if self.certificate_prompts is not None and not self.certificate:
            raise InputError(
                "--certificate-prompts is for a certificate; leave --no-certificate out"
            )
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"the seed must be within [0, 2^63), got {self.seed}")

    @property
    def goal(self) -> Goal:
        """What is asked for; ratio 32 unless something else is."""
        if self.ratio is None and self.max_bytes is None and self.max_kl is None:
            return Goal(ratio=DEFAULT_RATIO)
        return Goal(self.ratio, self.max_bytes, self.max_kl)


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written. `ratio` counts every file of the artifact; `notes` are for the user."""

    path: Path
    digest: str
    n_bytes: int
    ratio: float
    n_tensors: int
    n_unchanged: int
    fidelity: dict[str, Any]
    notes: tuple[str, ...] = ()


def summarise(
    out: Path, digest: str, config: DeltaConfig, n_tensors: int, notes: tuple[str, ...] = ()
) -> Summary:
    """Describe the artifact just published at `out`."""
    n_bytes = sum(file.stat().st_size for file in out.iterdir())
    ratio = config.finetuned_bytes / n_bytes
    n_unchanged = len(config.unchanged)
    return Summary(out, digest, n_bytes, ratio, n_tensors, n_unchanged, config.fidelity, notes)
