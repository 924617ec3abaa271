"""transformers `generate` on static batches: whole checkpoints swapped in place, or PEFT adapters.

Runs in the peers' virtual environments: torch, transformers and (for adapters) peft, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

PAD = 0  # any id: masked out


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One sequence to make; `events` gets each token id, then None, or an exception."""

    model: str
    prompt: list[int]
    max_tokens: int
    events: SimpleQueue[int | Exception | None] = field(default_factory=SimpleQueue)


class StaticModel(Protocol):
    """Generates for a batch whose sequences start and end together."""

    @property
    def mixes(self) -> bool:
        """Whether one batch may hold requests of several variants."""
        ...

    @property
    def names(self) -> list[str]:
        """What may be asked for."""
        ...

    def generate(self, batch: Sequence[Request]) -> None:
        """Put every token into its request's `events` as soon as it is known."""
        ...


class SwappedCheckpoints:
    """One model in memory; before a batch of another variant its weights are overwritten."""

    mixes = False

    def __init__(self, base: Path, base_name: str, checkpoints: Mapping[str, Path]) -> None:
        self._paths = {base_name: base, **checkpoints}
        self._model = load_base(base)
        self._loaded = base_name

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def generate(self, batch: Sequence[Request]) -> None:
        (name,) = {request.model for request in batch}
        if name != self._loaded:
            self._loaded = ""  # a swap that fails half-way must not pass for either
            overwrite(self._model, self._paths[name])
            self._loaded = name
        run_batch(self._model, batch)


class MixedAdapters:
    """PEFT: every adapter in memory, each row of a batch names its own."""

    mixes = True

    def __init__(self, base: Path, base_name: str, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel  # not in the environment that swaps checkpoints

        if not adapters:
            raise ValueError("at least one adapter is needed; the base alone needs no PEFT")
        self._base_name = base_name
        self._adapters = list(adapters)
        model: Any = load_base(base)
        # Kept in the base's dtype (the default, float32, would cast every activation), and not
        # filled with random numbers before the file is read.
        options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        for index, (name, path) in enumerate(adapters.items()):
            if index == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=name, **options)
            else:
                model.load_adapter(path, adapter_name=name, **options)
        self._model = model.eval()

    @property
    def names(self) -> list[str]:
        return [self._base_name, *self._adapters]

    def generate(self, batch: Sequence[Request]) -> None:
        names = ["__base__" if r.model == self._base_name else r.model for r in batch]
        run_batch(self._model, batch, adapter_names=names)


def load_base(path: Path) -> PreTrainedModel:
    """Load a checkpoint in its own dtype, never to stop at an end-of-sequence token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def overwrite(model: PreTrainedModel, checkpoint: Path) -> None:
    """Copy a checkpoint's weights over the model's. Raises ValueError if their names differ."""
    left = dict(model.named_parameters())
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name not in left:
                    raise ValueError(f"{file}: the base has no {name}")
                left.pop(name).copy_(tensors.get_tensor(name))
    if left:
        raise ValueError(f"{checkpoint} lacks {', '.join(left)}")


class _Tokens(BaseStreamer):
    """Hands each step's tokens to the batch's requests; the first call brings the prompts."""

    def __init__(self, batch: Sequence[Request]) -> None:
        self._batch = batch
        self._step = -1

    def put(self, value: torch.Tensor) -> None:
        self._step += 1
        if self._step == 0:
            return
        for request, token in zip(self._batch, value.tolist(), strict=True):
            if self._step <= request.max_tokens:
                request.events.put(token)
            if self._step == request.max_tokens:
                request.events.put(None)

    def end(self) -> None:
        """Every request has had its None."""


@torch.inference_mode()
def run_batch(model: Any, batch: Sequence[Request], **options: Any) -> None:
    """Greedy tokens for prompts of any lengths, padded on the left."""
    width = max(len(request.prompt) for request in batch)
    rows = [[PAD] * (width - len(r.prompt)) + r.prompt for r in batch]
    mask = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch]
    model.generate(
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=max(request.max_tokens for request in batch),
        do_sample=False,
        pad_token_id=PAD,
        streamer=_Tokens(batch),
        **options,
    )


Loader = Callable[[Path, str, Mapping[str, Path]], StaticModel]
KINDS: dict[str, Loader] = {"transformers": SwappedCheckpoints, "peft": MixedAdapters}
