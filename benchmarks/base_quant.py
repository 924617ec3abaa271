"""What 8-bit base weights cost: KL per token of a model whose base is quantised, deltas unchanged.

    python -m benchmarks.base_quant --base BASE --task intent=FINETUNE,DELTA,DATA

All linears of the layers get one scale per output (`server.ops.quantize`); embeddings, lm_head
and norms stay. The deltas were made against the unquantised base, and are added to the other.
Models run in float32 on the stored weights, so only the weights differ. Texts are the task's test
prompts with their answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.tasks import load_items
from compressor.artifact.reader import read_artifact
from compressor.checkpoint.files import Checkpoint
from compressor.measure.fidelity import Fidelity, compare, encode_texts, load_model, merge_into
from server.ops.quantize import quantize_float8, quantize_int8

METHODS = {"int8": quantize_int8, "float8": quantize_float8}
Quantiser = Callable[[Tensor], Any]


def rounding_errors(model: nn.Module, quantise: Quantiser) -> dict[str, Tensor]:
    """``Q(W) - W`` of every linear but the output embedding, by parameter name."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    errors = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            weight = module.weight.data
            errors[f"{path}.weight"] = quantise(weight).dense(torch.float32) - weight
    return errors


def add_(model: nn.Module, changes: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name] += change


def show(what: str, result: Fidelity) -> None:
    agreed = f"{100 * result.top1_agreement:.2f} %"
    print(f"| {what} | {result.kl_per_token:.2g} | {agreed} | {result.n_tokens} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FT,DELTA,DATA")
    parser.add_argument("--items", type=int, default=96)
    options = parser.parse_args()
    base = load_model(options.base)
    errors = {name: rounding_errors(base, quantise) for name, quantise in METHODS.items()}
    print("| model | KL per token | same top token | tokens |\n|---|---:|---:|---:|")
    for entry in options.task:
        task, _, paths = entry.partition("=")
        tuned_dir, delta_dir, data = (Path(part) for part in paths.split(","))
        items = load_items(task, data, options.items)
        tokenizer = AutoTokenizer.from_pretrained(tuned_dir)
        samples = encode_texts(tokenizer, [item.prompt + item.answer for item in items])
        for name, changes in errors.items():
            candidate = load_model(options.base)
            add_(candidate, changes)
            show(f"{name} base, {task} text", compare(base, candidate, samples))
        tuned, candidate = load_model(tuned_dir), load_model(tuned_dir)
        merge_into(candidate, Checkpoint(options.base), read_artifact(delta_dir).tensors)
        show(f"base + delta {task}", compare(tuned, candidate, samples))
        for name, changes in errors.items():
            add_(candidate, changes)
            show(f"{name} base + delta {task}", compare(tuned, candidate, samples))
            add_(candidate, {key: -change for key, change in changes.items()})


if __name__ == "__main__":
    main()
