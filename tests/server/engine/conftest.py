"""Served directories: a tiny base and deltas of its fine-tunes, made with our own compressor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.artifact import read_artifact
from compressor.pipeline import Options, compress
from compressor.reconstruct import reconstruct
from tests.tiny import Kind, make_tiny, perturb


@dataclass(frozen=True)
class Served:
    """A base, a deltas directory, and for each name the checkpoint that is the truth for it."""

    base: Path
    deltas: Path
    checkpoints: dict[str, Path]

    def oracle(self, name: str) -> PreTrainedModel:
        """Hugging Face model of the base or of a variant's reconstructed checkpoint."""
        return AutoModelForCausalLM.from_pretrained(self.checkpoints[name], dtype=torch.float32)


def build_served(
    folder: Path,
    kind: Kind,
    codecs: dict[str, Options],
    *,
    extra_vocab: int = 0,
    **config: object,
) -> Served:
    """Compress one fine-tune per entry and reconstruct it, both with the public functions."""
    base = make_tiny(kind, folder / "base", seed=3, **config)
    checkpoints = {"base": base}
    deltas = folder / "deltas"
    deltas.mkdir()
    for i, (name, options) in enumerate(codecs.items()):
        tuned = perturb(
            base, folder / f"ft-{name}", seed=10 + i, scale=0.1, extra_vocab=extra_vocab
        )
        compress(base, tuned, deltas / name, options)
        checkpoints[name] = reconstruct(
            base, deltas / name, folder / f"merged-{name}", dtype="float32"
        )
        read_artifact(deltas / name)
    return Served(base, deltas, checkpoints)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Served]:
    """Factory with a cache: the same arguments give the same directories."""
    made: dict[str, Served] = {}

    def make(kind: Kind, codecs: dict[str, Options], **more: object) -> Served:
        key = repr((kind, codecs, more))
        if key not in made:
            made[key] = build_served(tmp_path_factory.mktemp(kind), kind, codecs, **more)
        return made[key]

    return make
