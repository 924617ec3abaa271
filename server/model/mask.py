"""Which earlier positions a layer's tokens see, read from the masks that its definition makes.

In the probing pass transformers builds masks with `hand_over`, which makes none: it hands the mask
function itself, a predicate on (batch, head, query, key), to the attention hook. A few rows and one
column of it tell which of the known forms it is. Steps build no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface

from server.errors import ConfigError
from server.model.refusal import WAY_OUT

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PIECE = 1 << 18  # pairs evaluated at once
NEAR = 48  # queries whose rows are looked at whole, from the first on
BEYOND = 8  # keys looked at past each query: none may be seen
KNOWN = "causal attention, whole, in a sliding window or in chunks"
ROW_KEYS = 1 << 16  # of a far query, at most: those next to it, to its edge, and the first


@dataclass(frozen=True, slots=True)
class MaskForm:
    """What a token sees: every earlier position and itself, or not so many.

    window  only the last `window` of these
    chunk   only those since the last multiple of `chunk`
    """

    window: int | None = None
    chunk: int | None = None

    def first_seen(self, query: int) -> int:
        """The earliest position that token `query` sees."""
        first = 0 if self.window is None else max(0, query - self.window + 1)
        return first if self.chunk is None else max(first, query - query % self.chunk)


CAUSAL = MaskForm()


class MaskUsed(Exception):
    """A definition computes with its mask and does not just hand it to the attention hook."""


class _AnySize:
    """Of a mask that fits: some definitions compare it with what they expect."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class HandedMask:
    """A mask function where definitions expect a mask. They may cut it to the keys' length, want
    another dtype, and compare its size; for any other use it raises MaskUsed.
    """

    function: MaskFunction
    device: torch.device

    def __getitem__(self, _: object) -> Self:
        return self

    def size(self) -> _AnySize:
        return _AnySize()

    def to(self, *_: object, **__: object) -> Self:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        raise MaskUsed(name)

    @classmethod
    def __torch_function__(cls, function: object, *_: object, **__: object) -> Any:
        raise MaskUsed(getattr(function, "__name__", "torch"))


def hand_over(*_: Any, mask_function: MaskFunction, **others: Any) -> HandedMask:
    """A mask builder for transformers' `AttentionMaskInterface`."""
    device = others.get("device")  # some versions say
    return HandedMask(mask_function, torch.device("cpu" if device is None else device))


def register_masks(name: str) -> None:
    """Let definitions hand mask functions to the attention of this name (idempotent)."""
    AttentionMaskInterface.register(name, hand_over)


@contextmanager
def attention_named(model: nn.Module, name: str) -> Iterator[None]:
    """The model's modules use the attention that transformers knows by this name meanwhile."""
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    use_attention(model, name)
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


def use_attention(model: nn.Module, name: str) -> None:
    """Likewise, from now on."""
    for config in _configs(model):
        config._attn_implementation = name


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that the modules look the name up in, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if hasattr(c, "_attn_implementation")}.values())


def form_of(mask: HandedMask, n_positions: int) -> MaskForm:
    """The form that the mask function has on all sequences of up to `n_positions` tokens.

    The first query that does not see key 0 can be one thing only; that this is what the function
    does elsewhere too is looked at: all of the first rows, rows around every edge, and far ones.
    Raises ConfigError if it is none of the forms.
    """
    edge = next(_blind_to_first(mask, n_positions), None)
    forms = [CAUSAL] if edge is None else [MaskForm(window=edge), MaskForm(chunk=edge)]
    queries = list(_queries(edge, n_positions))
    for form in forms:
        if all(_agrees(mask, form, query) for query in queries):
            return form
    raise ConfigError(
        f"this base model's attention has a mask that is {_in_words(mask, n_positions)}; "
        f"the server knows {KNOWN}; {WAY_OUT}"
    )


def _blind_to_first(mask: HandedMask, n_positions: int) -> Iterator[int]:
    """Queries that do not see key 0, ascending."""
    for start in range(0, n_positions, PIECE):
        queries = torch.arange(start, min(start + PIECE, n_positions))
        seen = _evaluate(mask, queries, torch.zeros_like(queries))
        yield from (start + (~seen).nonzero()).flatten().tolist()


def _queries(edge: int | None, n_positions: int) -> Iterable[int]:
    around = [] if edge is None else [edge * k + i for k in (1, 2, 3) for i in (-2, -1, 0, 1)]
    far = [n_positions // 3, n_positions // 2, n_positions - 2, n_positions - 1]
    return sorted({q for q in (*range(NEAR), *around, *far) if 0 <= q < n_positions})


def _agrees(mask: HandedMask, form: MaskForm, query: int) -> bool:
    first = form.first_seen(query)
    keys = torch.arange(max(0, query - ROW_KEYS), query + BEYOND)
    edges = [torch.arange(max(0, at - BEYOND), min(at + BEYOND, query)) for at in (0, first)]
    keys = torch.cat([*edges, keys])
    seen = _evaluate(mask, torch.full_like(keys, query), keys)
    return torch.equal(seen, (keys >= first) & (keys <= query))


def _evaluate(mask: HandedMask, queries: Tensor, keys: Tensor) -> Tensor:
    """Booleans of each pair. Raises ConfigError where the function has no answer."""
    pairs = (torch.zeros_like(queries), torch.zeros_like(queries), queries, keys)
    try:
        seen = mask.function(*(index.to(mask.device) for index in pairs))
        return seen.to(torch.bool).cpu().expand(queries.shape)
    except Exception as error:  # a definition's own code, about indices it may not expect
        raise ConfigError(
            "this base model's attention has a mask that depends on more than positions; the "
            f"server knows {KNOWN}; {WAY_OUT}"
        ) from error


def _in_words(mask: HandedMask, n_positions: int) -> str:
    """What is unusual about it, as far as a few pairs tell."""
    query = min(2, n_positions - 1)
    ahead = _evaluate(mask, torch.tensor([query]), torch.tensor([query + 1]))
    return "not causal: tokens see later ones" if bool(ahead) else "of an unknown form"
