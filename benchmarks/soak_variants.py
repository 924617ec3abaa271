"""Variants that nobody could take for each other: a base and noise, compressed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor.compress.options import NO_CODER, Options
from compressor.compress.pipeline import compress

NOISE = 0.3  # of a matrix's own standard deviation: other words, still finite
RATIO = 32.0


def write_finetune(base: Path, out: Path, seed: int) -> None:
    """The base with noise on every matrix of its layers."""
    out.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and ".layers." in name:
                noise = torch.randn(tensor.shape, generator=generator) * float(tensor.std())
                tensors[name] = (tensor.float() + NOISE * noise).to(tensor.dtype)
        save_file(tensors, out / path.name, {"format": "pt"})


def write_variants(base: Path, out: Path, count: int) -> list[Path]:
    """Artifacts of so many fine-tunes."""
    made = []
    for seed in range(count):
        with tempfile.TemporaryDirectory(prefix="impart-soak-") as folder:
            write_finetune(base, Path(folder) / "finetune", seed)
            options = Options(codec="blockdiag", ratio=RATIO, entropy=NO_CODER)
            compress(base, Path(folder) / "finetune", out / f"artifact-{seed}", options)
        made.append(out / f"artifact-{seed}")
    return made
