"""Definitions that multiply queries and keys themselves, outside transformers' attention interface.

Older ones do: BLOOM, Falcon, GPT-J, MPT, ... While the forward of such a module runs, the product
of all queries with all keys is not computed; `Scores` stands for it, and what multiplies that with
the values calls the attention function after all, in a step as in the passes before. What is done
to the scores in between is learned in the first pass: it is the same in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from server.model.alibi import Alibi, alibi_of
from server.model.attention import attention_forward
from server.model.mask import HandedMask
from server.model.positions import StepPositions
from server.model.scores import Recipe, Scores, ScoresUsed

_PRODUCTS = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
    | {torch.baddbmm, Tensor.baddbmm}
)


@dataclass(frozen=True, slots=True)
class QueryKeyProduct:
    """``q [.., T, D]`` times ``k [.., T, D]``, and what baddbmm makes of it.

    scale  of the product
    added  None if nothing is
    """

    q: Tensor
    k: Tensor
    scale: float = 1.0
    added: tuple[Tensor, float] | None = None

    def recipe(self) -> Recipe:
        """A sum that begins with zeros is a product."""
        tensor, factor = self.added or (self.q, 0.0)
        biases = [tensor * factor] if factor and bool(tensor.any()) else []
        return Recipe(self.scale, biases=biases)

    @property
    def is_square(self) -> bool:
        return self.q.dim() in (3, 4) and self.q.shape[-2] == self.k.shape[-2]


@dataclass(frozen=True, slots=True)
class Learned:
    """One product of a module's forward: what becomes of the scores."""

    width: int
    scale: float
    mask: HandedMask | None
    alibi: Alibi | None


@dataclass(slots=True)
class OwnAttention:
    """A module's forward in which `Scores` stand for the product of queries and keys.

    positions  ``[T]`` of the step's rows; see `StepPositions`
    learned    its products in order, from the first pass on
    """

    module: nn.Module
    positions: StepPositions
    n_tokens: int
    learned: list[Learned] = field(default_factory=list)
    is_learning: bool = True
    _known: set[nn.Module] = field(default_factory=set)
    _depth: int = 0
    _n_calls: int = 0

    def install(self) -> None:
        vars(self.module)["forward"] = self.forward

    def remove(self) -> None:
        vars(self.module).pop("forward", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._look_into_children()
        self._n_calls, self._depth = 0, 0
        with _Intercepting(self):
            return type(self.module).forward(self.module, *args, **kwargs)

    def stand_in(self, product: QueryKeyProduct) -> Scores | None:
        """For a product in the module's own code, if it is one of queries and keys."""
        if self._depth or not product.is_square or not self._is_of_queries(product):
            return None
        q, k = (x if x.dim() == 4 else x.unsqueeze(0) for x in (product.q, product.k))
        recipe = product.recipe() if self.is_learning else None
        return Scores(q, k, product.q.dim(), recipe, self._attend)

    def _is_of_queries(self, product: QueryKeyProduct) -> bool:
        tokens, width = product.q.shape[-2:]
        if self.is_learning:
            return tokens == self.n_tokens
        wanted = self.learned[self._n_calls].width if self._n_calls < len(self.learned) else None
        return bool(width == wanted)

    def _attend(self, scores: Scores, v: Tensor) -> Tensor:
        if scores.recipe is not None:
            self.learned.append(_learn(self.module, scores, scores.recipe, v))
        learned = self.learned[self._n_calls]
        self._n_calls += 1
        q, k = scores.q.to(v.dtype), scores.k.to(v.dtype)
        if learned.alibi is not None:
            q, k = learned.alibi.joined(q, k, self.positions.of(self.module, q.shape[2]))
        out, _ = attention_forward(self.module, q, k, v, learned.mask, scaling=learned.scale)
        return out.transpose(1, 2)

    def _look_into_children(self) -> None:
        """Products within layers are the layers' own; those may be replaced at any time."""
        for child in self.module.children():
            if child not in self._known:
                self._known.add(child)
                child.register_forward_pre_hook(self._enter)
                child.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


def own_attention(model: PreTrainedModel, ids: Tensor) -> list[OwnAttention]:
    """Who multiplies queries and keys, in a pass over ``ids [1, T]``; T is no other size of the
    model.
    """
    found: dict[nn.Module, None] = {}
    with _Noting(model, ids.shape[1], found), torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    if not found:
        return []
    positions = StepPositions(model)
    return [OwnAttention(module, positions, ids.shape[1]) for module in found]


@contextmanager
def own_forwards(own: Sequence[OwnAttention]) -> Iterator[None]:
    """The modules have their definition's forward meanwhile."""
    for attention in own:
        attention.remove()
    try:
        yield
    finally:
        for attention in own:
            attention.install()


class _Noting(TorchFunctionMode):
    """Notes the innermost module around each product of all tokens with all."""

    def __init__(self, model: nn.Module, tokens: int, found: dict[nn.Module, None]) -> None:
        super().__init__()
        self._model, self._tokens, self._found = model, tokens, found
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for module in self._model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._enter_module))
            self._hooks.append(module.register_forward_hook(self._leave_module))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        while self._hooks:
            self._hooks.pop().remove()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _leave_module(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _PRODUCTS and self._running:
            product = _product(function, args, kwargs or {})
            if product is not None and product.is_square and product.q.shape[-2] == self._tokens:
                self._found[self._running[-1]] = None
        return function(*args, **(kwargs or {}))


class _Intercepting(TorchFunctionMode):
    """Entered while the module's forward runs."""

    def __init__(self, attention: OwnAttention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS:
            product = _product(function, args, kwargs)
            scores = None if product is None else self._attention.stand_in(product)
            if scores is not None:
                return scores
        return function(*args, **kwargs)


def _product(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> QueryKeyProduct | None:
    """None if its operands are no matrices of several heads."""
    scale, added = 1.0, None
    if function in (torch.baddbmm, Tensor.baddbmm):
        given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
        one, other = given["batch1"], given["batch2"]
        scale, added = float(given.get("alpha", 1)), (given["input"], float(given.get("beta", 1)))
    else:
        one, other = (*args, *kwargs.values())[:2]
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or other.dim() < 3:
        return None
    return QueryKeyProduct(one, other.transpose(-1, -2), scale, added)


def _learn(module: nn.Module, scores: Scores, recipe: Recipe, v: Tensor) -> Learned:
    """Raises ScoresUsed if some bias is no ALiBi, or a mask is none that is known."""
    heads, tokens, width = scores.q.shape[1:]
    alibi = alibi_of(recipe.biases, heads, tokens, recipe.scale)
    mask = _joined_mask([_as_function(module, mask, tokens) for mask in recipe.masks])
    return Learned(width, recipe.scale, mask, alibi)


def _as_function(module: nn.Module, mask: HandedMask | Tensor, tokens: int) -> HandedMask:
    """A boolean mask of the definition's own is a part of a buffer for all positions."""
    if isinstance(mask, HandedMask):
        return mask
    for buffer in module.buffers(recurse=False):
        whole = buffer.dtype == torch.bool and buffer.shape[-1:] == buffer.shape[-2:-1]
        if whole and buffer.numel() == buffer.shape[-1] ** 2:
            square = buffer.view(buffer.shape[-2:])
            if torch.equal(square[:tokens, :tokens], mask.view(mask.shape[-2:])):
                return _of_buffer(square)
    raise ScoresUsed("its attention makes a mask itself, which the server cannot read")


def _of_buffer(square: Tensor) -> HandedMask:
    last = len(square) - 1

    def seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return square[query.clamp(max=last), key.clamp(max=last)] & (key <= last)

    return HandedMask(seen, square.device)


def _joined_mask(masks: Sequence[HandedMask]) -> HandedMask | None:
    """What all of them let see."""
    if len(masks) < 2:
        return masks[0] if masks else None

    def seen(*pair: Tensor) -> Tensor:
        return torch.stack([mask.function(*pair).expand(pair[2].shape) for mask in masks]).all(0)

    return HandedMask(seen, masks[0].device)
