"""Tiny models of any case of the matrix: a base and fine-tunes of it, saved as transformers saves.

The weights are random, and scaled so that attention is neither flat nor a single place, far tokens
matter, and the best logit leads by much more than float32 rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from tests.models.cases import Case
from tests.models.shrink import FIRST_OTHER_TOKEN, VOCAB
from tests.tiny import make_tokenizer

MAX_PARAMETERS = 10_000_000
FIRST_TEXT_TOKEN = 5
LOGIT_SPREAD = 3.0  # standard deviation of logits over the vocabulary
GAIN = 1.5
# Buffers that training moves: what a checkpoint keeps beside its parameters.
TRAINED_BUFFER = re.compile(r"(correction_bias|expert_bias|layer_scalar)$")


class NotBuilt(Exception):
    """transformers cannot make a tiny model of the case; the message says why."""


@dataclass(frozen=True)
class Pair:
    """A saved base and fine-tunes of it."""

    base: Path
    finetunes: tuple[Path, ...]


def build(case: Case, folder: Path, *, n_finetunes: int = 2, seed: int = 0) -> Pair:
    """Write the case's base and fine-tunes into `folder`. Raises NotBuilt."""
    tokenizer = make_tokenizer(VOCAB)
    model = tiny_model(case, seed)
    base = folder / "base"
    names = [folder / f"finetune-{i}" for i in range(n_finetunes)]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        for i, path in enumerate([base, *names]):
            if i:
                model.load_state_dict(start)
                fine_tune(model, torch.Generator().manual_seed(seed + i))
                if case.added_rows:
                    _add_rows(model, case.added_rows, torch.Generator().manual_seed(seed - i))
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            if case.added_rows and i:
                _shrink_rows(model)
    except Exception as error:
        raise NotBuilt(f"it cannot be saved: {_first_line(error)}") from error
    return Pair(base, tuple(names))


def tiny_model(case: Case, seed: int = 0) -> PreTrainedModel:
    """The case's model with random weights, in float32, for inference. Raises NotBuilt."""
    try:
        config = case.config()
    except Exception as error:
        raise NotBuilt(f"its configuration: {_first_line(error)}") from error
    try:
        with torch.device("meta"):
            outline = model_of(config)
        n_parameters = sum(weight.numel() for weight in outline.parameters())
        if n_parameters > MAX_PARAMETERS:
            raise NotBuilt(f"it has {n_parameters} parameters: it does not become tiny")
        torch.manual_seed(seed)
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = model_of(case.config(), **options).eval()
        initialise(model, torch.Generator().manual_seed(seed))
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"its model: {_first_line(error)}") from error
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model.generation_config = GenerationConfig(**ids)
    return model


def model_of(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model that the first of transformers' auto classes makes of a configuration."""
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    kind = next((k for k in kinds if type(config) in k._model_mapping), kinds[0])
    model: PreTrainedModel = kind.from_config(config, **options)
    return model


def prompt_of(length: int, seed: int) -> list[int]:
    """Random ids of text: nothing that a definition takes for an image or for padding."""
    generator = torch.Generator().manual_seed(seed)
    high = FIRST_OTHER_TOKEN
    return torch.randint(FIRST_TEXT_TOKEN, high, (length,), generator=generator).tolist()


@torch.no_grad()
def initialise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give every parameter a random value of a useful size.

    Matrices keep the size of what they multiply. A vector keeps where its definition starts it (a
    norm at 1 or, as Gemma's, at 0) and moves from there. The output is scaled to `LOGIT_SPREAD`.
    """
    for module, name, value in _parameters(model):
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() < 2:
            value.copy_(torch.nan_to_num(value) + 0.1 * noise)
        elif isinstance(module, nn.Embedding):
            value.copy_(noise)
        else:
            n_inputs = value.shape[0] if isinstance(module, Conv1D) else value[0].numel()
            n_inputs = value.shape[-1] if value.dim() == 3 and "expert" in name else n_inputs
            value.copy_(noise * GAIN * n_inputs**-0.5)
    _move_buffers(model, generator)
    model.tie_weights()
    _scale_output(model)


@torch.no_grad()
def fine_tune(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Move every parameter: matrices by a tenth of their spread, vectors by 1 to 40 %."""
    for _, _, value in _parameters(model):
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() < 2:
            part = 0.01 * 40 ** float(torch.rand((), generator=generator))
            value.add_(part * value.abs().mean().clamp(0.1, 1.0) * noise)
        else:
            value.add_(0.1 * value.std() * noise)
    _move_buffers(model, generator)


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, whole name, value) of every parameter, a shared one once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) not in seen and value.is_floating_point() and value.numel():
                seen.add(id(value))
                yield module, f"{path}.{name}", value.data


def _move_buffers(model: nn.Module, generator: torch.Generator) -> None:
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept and buffer.is_floating_point() and TRAINED_BUFFER.search(name):
            buffer.add_((0.1 * torch.randn(buffer.shape, generator=generator)).to(buffer.dtype))


def _scale_output(model: PreTrainedModel) -> None:
    """Scale the output matrix (or the table it is tied to) to useful logits, in a few rounds: what
    is capped or tied does not follow at once.
    """
    output = model.get_output_embeddings()
    if output is None:
        return
    ids = torch.tensor([prompt_of(32, seed=1)])
    for _ in range(4):
        spread = float(model(input_ids=ids, use_cache=False).logits[0].std(-1).mean())
        if 0.5 * LOGIT_SPREAD < spread < 1.5 * LOGIT_SPREAD or not 0 < spread < float("inf"):
            return
        output.weight.mul_(LOGIT_SPREAD / spread)


def _add_rows(model: PreTrainedModel, count: int, generator: torch.Generator) -> None:
    model.resize_token_embeddings(VOCAB + count, mean_resizing=False)
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for table in tables:
            fresh = torch.randn(count, table.shape[1], generator=generator)
            table[VOCAB:] = fresh * table[:VOCAB].std()


def _shrink_rows(model: PreTrainedModel) -> None:
    model.resize_token_embeddings(VOCAB, mean_resizing=False)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
