"""What stands for the product of all queries with all keys in definitions that compute it.

It is never computed. It notes what the definition does to it up to the softmax: scales, masks, and
biases; multiplied with the values, it calls the attention function of transformers' interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from server.model.mask import HandedMask

LOWEST = -1e4  # of scores: what is below is masked


class ScoresUsed(Exception):
    """A definition does something else with its scores; the message has subject and verb."""


@dataclass(slots=True)
class Recipe:
    """What a definition does to its scores.

    scale   of the product of queries and keys
    masks   those that were handed over, and boolean ones of its own
    biases  what it adds, scaled as it is
    """

    scale: float = 1.0
    masks: list[HandedMask | Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    def multiply(self, factor: float) -> None:
        self.scale *= factor
        self.biases = [bias * factor for bias in self.biases]


Attend = Callable[["Scores", Tensor], Tensor]


class Scores:
    """``[1, H, T, T]``, or ``[H, T, T]``.

    q, k    ``[1, H, T, D]``, ``[1, Hkv, T, D]``
    recipe  None if it is known already, and not noted again
    attend  gives ``[1, H, T, Dv]`` for these scores and ``v [1, Hkv, T, Dv]``
    """

    def __init__(self, q: Tensor, k: Tensor, ndim: int, recipe: Recipe | None, attend: Attend):
        self.q, self.k, self.recipe = q, k, recipe
        self.ndim, self.dtype, self.device = ndim, q.dtype, q.device
        self._attend = attend

    @property
    def shape(self) -> torch.Size:
        tokens, heads = self.q.shape[2], self.q.shape[1]
        return torch.Size((1, heads, tokens, tokens)[4 - self.ndim :])

    def size(self, axis: int | None = None) -> torch.Size | int:
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        return self.ndim

    def view(self, *sizes: Any) -> Self:
        given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        if len(given) not in (3, 4):
            raise ScoresUsed(f"its attention reshapes its scores to {len(given)} axes")
        self.ndim = len(given)
        return self

    reshape = view

    def to(self, *_: Any, **__: Any) -> Self:
        return self

    float = contiguous = type_as = clone = detach = to

    def softmax(self, dim: int, *_: Any, **__: Any) -> Self:
        if dim not in (-1, self.ndim - 1):
            raise ScoresUsed("the softmax of its attention runs over the queries")
        return self

    def add(self, other: Any, *_: Any, **__: Any) -> Self:
        if self.recipe is not None and other is not None:
            masked = isinstance(other, HandedMask)
            (self.recipe.masks if masked else self.recipe.biases).append(other)
        return self

    def mul(self, factor: Any) -> Self:
        if self.recipe is not None:
            self.recipe.multiply(_number(factor))
        return self

    def div(self, factor: Any) -> Self:
        if self.recipe is not None:
            self.recipe.multiply(1 / _number(factor))
        return self

    def masked_fill(self, mask: Any, _: Any) -> Self:
        """Where the mask is true, or what was handed over says that a key is not seen."""
        if self.recipe is not None:
            self.recipe.masks.append(mask if isinstance(mask, HandedMask) else ~mask)
        return self

    def at_least(self, floor: Tensor) -> Self:
        """Bounded from below by what masked scores are."""
        if self.recipe is not None and not float(floor.max()) <= LOWEST:
            raise ScoresUsed("its attention bounds its scores from below")
        return self

    def where(self, seen: Any, _: Any) -> Self:
        """Kept where the mask is true."""
        if self.recipe is not None:
            self.recipe.masks.append(seen)
        return self

    def matmul(self, values: Tensor) -> Tensor:
        if not isinstance(values, Tensor):
            raise ScoresUsed("its attention multiplies its scores with each other")
        has_batch = values.dim() == 4
        out = self._attend(self, values if has_batch else values.unsqueeze(0))
        return out if has_batch else out.squeeze(0)

    __add__ = __radd__ = __iadd__ = add
    __mul__ = __rmul__ = __imul__ = mul
    __truediv__ = __itruediv__ = div
    __matmul__ = bmm = matmul
    masked_fill_ = masked_fill

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        raise ScoresUsed(f"its attention uses `{name}` on its scores")

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        _: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        known = _FUNCTIONS.get(function)
        if known is None:
            name = getattr(function, "__name__", "torch")
            raise ScoresUsed(f"its attention uses `{name}` on its scores")
        return known(*args, **(kwargs or {}))


def _number(factor: Any) -> float:
    if isinstance(factor, Tensor) and factor.numel() != 1:
        raise ScoresUsed("its attention scales its scores by a tensor")
    return float(factor)


def _add(one: Any, other: Any, **_: Any) -> Scores:
    return one.add(other) if isinstance(one, Scores) else other.add(one)


def _mul(one: Any, other: Any) -> Scores:
    return one.mul(other) if isinstance(one, Scores) else other.mul(one)


def _where(seen: Any, scores: Any, instead: Any) -> Scores:
    if not isinstance(scores, Scores):
        raise ScoresUsed("its attention fills its scores in where a mask is false")
    return scores.where(seen, instead)


def _unchanged(scores: Scores, *_: Any, **__: Any) -> Scores:
    return scores


def _softmax(scores: Scores, dim: int = -1, *_: Any, **__: Any) -> Scores:
    return scores.softmax(dim)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.softmax: _softmax,
    torch.softmax: _softmax,
    F.dropout: _unchanged,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.mul: _mul,
    Tensor.mul: _mul,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
    torch.div: Scores.div,
    torch.max: Scores.at_least,
    torch.maximum: Scores.at_least,
    torch.where: _where,
    torch.matmul: Scores.matmul,
    torch.bmm: Scores.matmul,
}
