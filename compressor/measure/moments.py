"""Second moments of the inputs of a model's linear layers, a few layers at a time.

``H = E[x x^T]`` over all tokens of the texts, as the fine-tune sees them; what GPTQ calls the
layer's Hessian, but for a factor. Layers that read the same input share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.codecs.siblings import sibling_groups
from compressor.errors import InputError
from compressor.measure.fidelity import encode_texts, load_model
from compressor.measure.samples import load_tokenizer

MEMORY_BYTES = 1 << 30

_Site = tuple[str, ...]


class InputMoments:
    """Moments of one fine-tune over one set of texts, computed when asked for.

    Beside the model itself, which is loaded once, at most `memory_bytes` of moments are held (or
    one layer's, if that is more). For that the texts run through the model as often as the
    moments of all layers exceed it: at 1 GiB once for a model of 135 M parameters, about 33 times
    for one of 8 B, whose widest layer alone takes 0.8 GB.

    model    a Hugging Face causal language model in evaluation mode
    samples  token ids of each text
    names    parameters wanted; those that are no linear layer's weight have no moments
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sequence[int]],
        names: Sequence[str],
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._model, self._samples = model, samples
        self._modules = _linear_modules(model)
        wanted = [name for name in names if name in self._modules]
        self._groups = list(_groups(sibling_groups(wanted), self._modules, memory_bytes))
        self._held: dict[str, Tensor] = {}

    @classmethod
    def of_checkpoint(
        cls,
        directory: Path,
        texts: Sequence[str],
        names: Sequence[str],
        memory_bytes: int = MEMORY_BYTES,
    ) -> InputMoments:
        """Load the model and its tokenizer. Raises CheckpointError, or InputError for the texts."""
        samples = encode_texts(load_tokenizer(directory, "calibration"), texts)
        return cls(load_model(directory), samples, names, memory_bytes)

    @property
    def names(self) -> list[str]:
        """Parameters that have moments, in the order in which they are cheapest to ask for."""
        return [name for group in self._groups for site in group for name in site]

    def get(self, name: str) -> Tensor | None:
        """Return float32 ``[n, n]`` on the CPU, or None if `name` is no linear layer's weight.

        Computes the moments of a whole group of layers and forgets those held before.
        """
        if name not in self._held:
            group = next((g for g in self._groups if any(name in site for site in g)), None)
            if group is None:
                return None
            self._held = {}
            self._held = self._compute(group)
        return self._held[name]

    def _compute(self, group: Sequence[_Site]) -> dict[str, Tensor]:
        sums = {site: _Sum() for site in group}
        seen: set[_Site] = set()
        hooks = []
        for site, total in sums.items():
            hook = _hook(total, site, seen, len(sums))
            hooks.append(self._modules[site[0]].register_forward_pre_hook(hook))
        try:
            for ids in self._samples:
                seen.clear()
                self._run(ids)
        finally:
            for handle in hooks:
                handle.remove()
        return {name: total.mean(site) for site, total in sums.items() for name in site}

    def _run(self, ids: Sequence[int]) -> None:
        """One text, no padding; stops once every layer wanted has had its input."""
        tokens = torch.tensor([list(ids)], device=self._model.device)
        try:
            with torch.inference_mode():
                self._model(input_ids=tokens, use_cache=False)
        except _Done:
            return


class LazyMoments:
    """`InputMoments.of_checkpoint`, loaded when first asked."""

    def __init__(self, directory: Path, texts: Sequence[str], names: Sequence[str]) -> None:
        self._arguments = directory, texts, names
        self._loaded: InputMoments | None = None

    def get(self, name: str) -> Tensor | None:
        """As `InputMoments.get`."""
        if self._loaded is None:
            self._loaded = InputMoments.of_checkpoint(*self._arguments)
        return self._loaded.get(name)


def hessians(
    checkpoint_dir: Path,
    texts: Sequence[str],
    parameter_names: Sequence[str],
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, moments) of every linear layer's weight among the names; see `InputMoments`."""
    moments = InputMoments.of_checkpoint(checkpoint_dir, texts, parameter_names, memory_bytes)
    for name in moments.names:
        found = moments.get(name)
        assert found is not None
        yield name, found


class _Done(Exception):
    """Nothing after this layer is wanted of this text."""


class _Sum:
    """Running sum of ``x x^T`` in float32, on the model's device."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._n_tokens = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        product = rows.T @ rows
        self._total = product if self._total is None else self._total.add_(product)
        self._n_tokens += len(rows)

    def mean(self, site: _Site) -> Tensor:
        if self._total is None:
            raise InputError(
                f"no calibration text reaches {site[0]}; give more texts with --calibration"
            )
        if not bool(torch.isfinite(self._total).all()):
            raise InputError(
                f"{site[0]}: its inputs overflow on the calibration texts; give others with "
                "--calibration"
            )
        return (self._total / self._n_tokens).cpu()


def _hook(
    total: _Sum, site: _Site, seen: set[_Site], n_sites: int
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        total.add(args[0])
        seen.add(site)
        if len(seen) == n_sites:
            raise _Done

    return add


def _linear_modules(model: Any) -> dict[str, nn.Module]:
    """Linear layers by the name of their weight; a tied embedding's is the output layer's."""
    from transformers.pytorch_utils import Conv1D

    found = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    output = model.get_output_embeddings()
    if output is not None:
        names = [n for n, p in model.named_parameters() if p is output.weight]
        found |= dict.fromkeys(names, output)
    return found


def _groups(
    sites: Sequence[Sequence[str]], modules: dict[str, nn.Module], memory_bytes: int
) -> Iterator[list[_Site]]:
    """Cut into runs whose moments fit into `memory_bytes`, each at least one site."""
    group: list[_Site] = []
    used = 0
    for site in sites:
        width = _input_width(modules[site[0]])
        if group and used + 4 * width * width > memory_bytes:
            yield group
            group, used = [], 0
        group.append(tuple(site))
        used += 4 * width * width
    if group:
        yield group


def _input_width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
