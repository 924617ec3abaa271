"""Export a delta as a PEFT LoRA: the best factors of each linear layer, and what that loses.

A full fine-tune's difference is not of low rank, so this is lossy on top of the compression, and
more so than any codec here; it is for servers that take nothing but LoRA. Only a delta that was a
LoRA comes out as it went in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.artifact.identity import identity_of
from compressor.artifact.reader import Artifact, read_artifact
from compressor.checkpoint.companions import copy_companions
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folder import resolve
from compressor.checkpoint.layout import Layout, Parameter, read_layout
from compressor.checkpoint.outputs import check_dtype, check_output
from compressor.checkpoint.writer import DTYPES, narrowed, published
from compressor.codecs import DenseRows, TensorDelta, lowrank_from_factors
from compressor.encoders.sources import TensorSource
from compressor.encoders.svd import factors
from compressor.errors import CheckpointError, InputError, UnsupportedTensor
from compressor.measure.fidelity import Fidelity, compare, encode_texts, load_model, merge_into
from compressor.measure.texts import read_texts
from compressor.peft.config import CONFIG_FILE, WEIGHTS
from compressor.progress import Progress, silent

Modules = Literal["linear", "all"]
_NOISE = 1e-6  # singular values below this times the largest are rounding
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class PeftExport:
    """What was written, and what it lost.

    relative_error  ``|dW - BA| / |dW|`` over all changed tensors, those left out included
    left_out        changed tensors of which the adapter has nothing
    fidelity        of the adapter against base + delta on the calibration texts, or None
    """

    path: Path
    rank: int
    relative_error: float
    left_out: tuple[str, ...]
    fidelity: Fidelity | None

    def warning(self) -> str:
        """Say in one sentence what the adapter is worth."""
        text = f"rank {self.rank} leaves a relative error of {self.relative_error:.3f} in the delta"
        if self.left_out:
            text += f"; {len(self.left_out)} changed tensors are left out, {self.left_out[0]} first"
        if self.fidelity is not None:
            text += (
                f"; KL(delta || adapter) {self.fidelity.kl_per_token:.4g} nats per token, "
                f"top-1 agreement {self.fidelity.top1_agreement:.1%}"
            )
        return text


@dataclass(slots=True)
class _Adapter:
    """The adapter as it grows: stored tensors, settings, and the delta it amounts to."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    whole_modules: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    deltas: list[TensorDelta] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    is_transposed: bool = False
    lost: float = 0.0
    total: float = 0.0


def export_peft(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    rank: int = 64,
    modules: Modules = "linear",
    dtype: str | None = None,
    calibration: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PeftExport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to `out`.

    rank         of the factors; a layer whose difference has a lower rank gets that
    modules      ``linear``: what LoRA servers take, linear layers but no lm_head; ``all``: also
                 factors of lm_head and embeddings, and norms saved whole
    dtype        of the factors; default: the base's
    calibration  texts to measure KL on

    Raises UnsupportedTensor for what no adapter can express: added vocabulary, experts.
    """
    if rank < 1:
        raise InputError(f"the rank must be 1 or more, got {rank}")
    check_dtype(dtype)
    check_output(out, [base, delta], [calibration] if calibration else [])
    texts = read_texts(calibration) if calibration else []
    with Checkpoint(base) as checkpoint:
        artifact = read_artifact(resolve(delta), base_identity=identity_of(checkpoint))
        layout = read_layout(checkpoint.path)
        _check(artifact, layout)
        stored_as = DTYPES[dtype or artifact.config.base.dtype]
        adapter = _Adapter()
        for done, changed in enumerate(artifact.tensors):
            (progress or silent)("factor", done, len(artifact.tensors))
            _add(adapter, checkpoint, layout, changed, rank, modules, stored_as)
        (progress or silent)("factor", len(artifact.tensors), len(artifact.tensors))
        if not adapter.tensors:
            raise InputError("the delta changes no layer that an adapter could hold")
        with published(out, overwrite, CONFIG_FILE) as folder:
            dropped = artifact.config.finetuned_details.get("dropped_files", [])
            copy_companions(checkpoint.path, folder, artifact.aux, dropped)
            fidelity = _measure(checkpoint, artifact, adapter, folder, texts) if texts else None
            error = math.sqrt(adapter.lost / adapter.total) if adapter.total else 0.0
            made = PeftExport(Path(out), rank, error, tuple(adapter.left_out), fidelity)
            save_file(adapter.tensors, folder / WEIGHTS, metadata={"format": "pt"})
            config = json.dumps(_config(artifact, adapter, rank), indent=2) + "\n"
            (folder / CONFIG_FILE).write_text(config)
            (folder / "README.md").write_text(_card(artifact, made), "utf-8")
    return made


def _check(artifact: Artifact, layout: Layout) -> None:
    for delta in artifact.tensors:
        parameter = layout.parameters.get(delta.name)
        if delta.shape != delta.base_shape:
            raise UnsupportedTensor(
                f"{delta.name}: the fine-tune adds rows (tokens), which an adapter cannot; "
                "export --to hf"
            )
        if parameter is None or (parameter.kind == "linear" and not _module(delta.name)):
            raise UnsupportedTensor(
                f"{delta.name}: an adapter has no place for a single expert; export --to hf"
            )


def _add(
    adapter: _Adapter,
    base: Checkpoint,
    layout: Layout,
    delta: TensorDelta,
    rank: int,
    modules: Modules,
    dtype: torch.dtype,
) -> None:
    parameter = layout.parameters[delta.name]
    key = layout.keys(base.tensors, base.name)[delta.name]
    ours = base.oriented_rows(key, 0, parameter.shape[0], delta.transposed).float()
    # The terms themselves where they are all: adding them to the base would round.
    change = sum((term.to_dense() for term in delta.terms), torch.zeros_like(ours))
    if delta.exact is not None:
        change = delta.reconstruct(ours) - ours
    size = _squared(change)
    adapter.total += size
    if _takes_factors(parameter, layout, modules):
        adapter.lost += _add_factors(adapter, parameter, change, rank, dtype)
    elif modules == "all" and parameter.kind == "vector" and "norm" in parameter.module.lower():
        module = delta.name.removesuffix(".weight")
        whole = narrowed(ours + change, dtype, delta.name)
        adapter.tensors[f"{_PREFIX}{delta.name}"] = whole
        adapter.whole_modules.append(module)
        adapter.deltas.append(_whole(delta, whole))
    else:
        adapter.left_out.append(delta.name)
        adapter.lost += size


def _takes_factors(parameter: Parameter, layout: Layout, modules: Modules) -> bool:
    """Tied matrices take none: an adapter changes one of the two, a delta both."""
    if parameter.name in {target for _, target in layout.tied}:
        return False
    if modules == "all":
        return parameter.kind in ("linear", "embedding")
    is_head = parameter.name.rpartition(".")[0] in ("lm_head", "embed_out")
    return parameter.kind == "linear" and not is_head


def _add_factors(
    adapter: _Adapter, parameter: Parameter, change: Tensor, rank: int, dtype: torch.dtype
) -> float:
    """Add the factors of one matrix; return the squared error they leave."""
    name, module = parameter.name, _module(parameter.name)
    a, b = factors(name, TensorSource(change), min(rank, *parameter.shape))
    strength = a.norm(dim=1) * b.norm(dim=1)
    used = max(1, int((strength > _NOISE * strength[0]).sum()))
    a, b = (narrowed(part[:used], dtype, name).contiguous() for part in (a, b))
    if parameter.kind == "embedding":
        adapter.tensors[f"{_PREFIX}{module}.lora_embedding_A"] = b
        adapter.tensors[f"{_PREFIX}{module}.lora_embedding_B"] = a.T.contiguous()
    else:
        adapter.tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        adapter.tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.T.contiguous()
    adapter.modules.append(module)
    adapter.is_transposed |= parameter.transposed
    if used != rank:
        adapter.ranks[module] = used
    shape = parameter.shape
    term = lowrank_from_factors(a.float(), b.float(), 32)
    adapter.deltas.append(TensorDelta(name, shape, shape, parameter.transposed, (term,), None))
    return _squared(change - term.to_dense())


def _whole(delta: TensorDelta, values: Tensor) -> TensorDelta:
    shape = delta.base_shape
    return TensorDelta(delta.name, shape, shape, False, (), DenseRows(0, values))


def _module(name: str) -> str:
    """Path of the module whose weight this is; empty for what is no module's weight."""
    if "experts." in name or not name.endswith(".weight"):
        return ""
    return name.removesuffix(".weight")


def _measure(
    base: Checkpoint,
    artifact: Artifact,
    adapter: _Adapter,
    tokenizer_folder: Path,
    texts: Sequence[str],
) -> Fidelity:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the delta's tokenizer, which measuring needs, cannot be loaded; export without "
            "--calibration"
        ) from error
    reference, candidate = load_model(base.path), load_model(base.path)
    merge_into(reference, base, artifact.tensors)
    merge_into(candidate, base, adapter.deltas)
    return compare(reference, candidate, encode_texts(tokenizer, texts))


def _config(artifact: Artifact, adapter: _Adapter, rank: int) -> dict[str, Any]:
    """``adapter_config.json``: alpha equals the rank everywhere, so that the scaling is 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": artifact.config.base.name_or_path,
        "revision": artifact.config.base.revision,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": dict(_patterns(adapter.ranks)),
        "alpha_pattern": dict(_patterns(adapter.ranks)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": adapter.is_transposed,
        "target_modules": sorted(adapter.modules),
        "modules_to_save": sorted(adapter.whole_modules) or None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _patterns(ranks: dict[str, int]) -> Iterator[tuple[str, int]]:
    """PEFT reads the keys as regular expressions on the end of a module's path."""
    for module, rank in ranks.items():
        yield "^" + module.replace(".", r"\."), rank


def _card(artifact: Artifact, made: PeftExport) -> str:
    base = artifact.config.base.name_or_path
    return f"""---
base_model: {json.dumps(base)}
library_name: "peft"
pipeline_tag: "text-generation"
tags: ["lora", "impart-delta"]
---
# {artifact.config.finetuned}, as a LoRA of {base}

Extracted by impart-serve from the delta `{artifact.digest[:12]}` of a full fine-tune, which is not
of low rank: {made.warning()}.
"""


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
