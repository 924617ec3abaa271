"""Decoder layers of Llama and its kin in fewer passes: every addition joins the norm after it.

Such a layer is ``h = h + attention(norm(h)); h = h + mlp(norm(h))``. The first sum goes to a norm
of the layer itself, the second to one of the next layer, or to the model's last. Which layers are
such is seen in one forward pass: each part must have got the very tensor that we would hand it, and
both sums must be plain ones, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.model.norm import DeltaNorm
from server.model.own_values import runs_by_slot

NORM_IN, NORM_MLP = "input_layernorm", "post_attention_layernorm"
PARTS = (NORM_IN, "self_attn", NORM_MLP, "mlp")
CHANGED = 0.1  # of a sum's elements, at least: what is added has to show


class ResidualLayer:
    """The forward of such a layer."""

    def __init__(self, layer: nn.Module, follower: DeltaNorm | None) -> None:
        self._norm_in, self._attention, norm, self._mlp = map(layer.get_submodule, PARTS)
        assert isinstance(norm, DeltaNorm)
        self._norm_mlp, self._follower = norm, follower

    def __call__(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        """``[1, T, n]`` -> the same shape; `rest` is for the attention."""
        normed = self._norm_in(hidden_states)
        attended, _ = self._attention(hidden_states=normed, **rest)
        normed, summed = self._norm_mlp.add(attended, hidden_states)
        y: Tensor = self._mlp(normed)
        return summed + y if self._follower is None else self._follower.add_ahead(y, summed)


def fuse_residuals(model: nn.Module, run: Callable[[], object]) -> int:
    """Give every such layer the forward above; `run` is a forward pass of the model.

    It is done once in any case. Returns how many layers there are.
    """
    layers = [m for m in model.modules() if _has_parts(m) and not runs_by_slot(m)]
    norms = [m for m in model.modules() if isinstance(m, DeltaNorm) and m.can_add]
    parts = [layer.get_submodule(name) for layer in layers for name in PARTS]
    watched = _Watched([*layers, *parts, *norms], run)
    chosen = [layer for layer in layers if _adds_plainly(layer, watched)]
    for layer in chosen:
        layer.forward = ResidualLayer(layer, _follower(layer, norms, watched))
    return len(chosen)


@dataclass(slots=True)
class _Call:
    """What a module got and gave.

    copy  of what it gave, as it was then: a model may change it in place
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    copy: Tensor | None = None

    @property
    def input(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    @property
    def rest(self) -> dict[str, Any]:
        return {name: value for name, value in self.kwargs.items() if name != "hidden_states"}


class _Watched:
    """One forward pass, module by module. Holds every tensor: identities stay unique."""

    def __init__(self, modules: Iterable[nn.Module], run: Callable[[], object]) -> None:
        self._calls: dict[nn.Module, list[_Call]] = {module: [] for module in modules}
        hooks = []
        for module in self._calls:
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()

    def only(self, module: nn.Module) -> _Call | None:
        """The call of a module that was called once, with one tensor by position or name."""
        calls = self._calls[module]
        if len(calls) != 1 or len(calls[0].args) > 1 or not isinstance(calls[0].input, Tensor):
            return None
        return calls[0]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module].append(_Call(args, kwargs))

    def _after(self, module: nn.Module, _: Any, output: Any) -> None:
        call = self._calls[module][-1]
        call.output = output
        call.copy = output.clone() if isinstance(output, Tensor) else None


def _has_parts(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if not all(_can_add(children.get(name)) for name in (NORM_IN, NORM_MLP)):
        return False
    others = [child for name, child in children.items() if name not in PARTS]
    return set(PARTS) <= set(children) and all(isinstance(o, nn.Dropout) for o in others)


def _can_add(module: nn.Module | None) -> bool:
    return isinstance(module, DeltaNorm) and module.can_add


def _adds_plainly(layer: nn.Module, watched: _Watched) -> bool:
    """Whether the forward above does what this layer did."""
    whole = watched.only(layer)
    found = [watched.only(layer.get_submodule(name)) for name in PARTS]
    norm_in, attention, norm_mlp, mlp = found
    if not (whole and norm_in and attention and norm_mlp and mlp):
        return False
    attended = attention.output
    if not (isinstance(attended, tuple) and len(attended) == 2) or mlp.rest:
        return False
    handed_on = (
        norm_in.input is whole.input
        and attention.input is norm_in.output
        and not attention.args
        and _same(attention.rest, whole.rest)
        and mlp.input is norm_mlp.output
    )
    return (
        handed_on
        and _is_sum(norm_mlp.input, whole.input, attended[0])
        and _is_sum(whole.copy, norm_mlp.input, mlp.output)
    )


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)


def _is_sum(summed: object, residual: Tensor, x: object) -> bool:
    """Whether it is ``residual + x`` to the bit, and x shows in it."""
    if not isinstance(x, Tensor) or not isinstance(summed, Tensor):
        return False
    if not x.shape == residual.shape == summed.shape or x.dtype != residual.dtype:
        return False
    changed = float((summed != residual).float().mean())
    return torch.equal(summed, residual + x) and changed > CHANGED


def _follower(layer: nn.Module, norms: list[DeltaNorm], watched: _Watched) -> DeltaNorm | None:
    """The norm that gets the layer's sum, as it was."""
    whole = watched.only(layer)
    assert whole is not None
    for norm in norms:
        call = watched.only(norm)
        if call is not None and call.input is whole.output and not call.rest:
            assert whole.copy is not None
            return norm if torch.equal(call.input, whole.copy) else None
    return None
