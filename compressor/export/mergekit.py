"""Export a delta to what other tools read: a Hugging Face model, or one with a mergekit recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from compressor.artifact.reader import read_config
from compressor.checkpoint.folder import resolve
from compressor.export.reconstruct import reconstruct
from compressor.progress import Progress

RECIPE = "mergekit.yaml"


def export_mergekit(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the reconstructed model, which mergekit reads like any other, and a recipe beside it.

    The recipe (``mergekit.yaml``) adds the fine-tune to the base with weight 1; further models are
    entered in its list. It names base and model as they are named here. Returns its path.
    """
    config = read_config(resolve(delta))
    reconstruct(base, delta, out, dtype=dtype, overwrite=overwrite, progress=progress)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(out), "parameters": {"weight": 1.0}}],
        "parameters": {"lambda": 1.0},
        "dtype": dtype or config.finetuned_details.get("dtype", config.base.dtype),
    }
    file = Path(out) / RECIPE
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file
