"""Attention modules of Llama and its kin in fewer passes: rotary embedding joins the cache write.

Which modules are such, their results say: one forward pass of the model as it is shows each
module's input, its q, k and v, and its output, and ours must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.model.kv_store import KVStore, ProbedCall
from server.model.linear import DeltaLinear
from server.model.norm import DeltaNorm
from server.model.own_values import runs_by_slot
from server.ops.attention import HeadNorm, Rotary, rotate

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")  # one per head, before turning (Qwen3)
POSITIONS = (0, 1, 7, 30, 61)  # of the probing pass
TOLERANCE = 0.02  # of the largest value: bfloat16 rounded at other places


class RotaryAttention:
    """``o(attend(rotary(norm(q(x))), rotary(norm(k(x))), v(x)))``, the norms if there are any."""

    def __init__(self, module: nn.Module, store: KVStore, seen: ProbedCall) -> None:
        self._module, self._store = module, store
        self._q, self._k, self._v, self._o = (module.get_submodule(n) for n in PROJECTIONS)
        self._q_norm, self._k_norm = (getattr(module, name, None) for name in NORMS)
        self._dim = seen.q.shape[-1]
        self._form = seen.form

    def __call__(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, n]; position_embeddings cos and sin [1, T, R] -> [1, T, n]."""
        cos, sin = position_embeddings
        norms = self._norms(hidden_states.dtype)
        out = self._store.attend(
            self._module,
            self.project(hidden_states) if norms is None else self._parts(hidden_states),
            self._form,
            Rotary(cos[0], sin[0]),
            norms,
        )
        return self.output(out), None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [1, T, n]`` -> q [T, H, D]; k, v [T, Hkv, D], normed, not yet turned."""
        q, k, v = self._parts(x)
        q, k = _normed(q, self._q_norm), _normed(k, self._k_norm)
        return q, k, v

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (x.shape[1], -1, self._dim)
        q, k, v = (part(x).view(shape) for part in (self._q, self._k, self._v))
        return q, k, v

    def _norms(self, dtype: torch.dtype) -> tuple[HeadNorm, HeadNorm] | None:
        """Of this step, if the kernels know both."""
        if not isinstance(self._q_norm, DeltaNorm) or not isinstance(self._k_norm, DeltaNorm):
            return None
        q, k = self._q_norm.of_heads(dtype), self._k_norm.of_heads(dtype)
        return None if q is None or k is None else (q, k)

    def output(self, out: Tensor) -> Tensor:
        """``out [T, H, D]`` -> [1, T, n]."""
        y: Tensor = self._o(out.view(1, len(out), -1))
        return y


def _normed(x: Tensor, norm: DeltaNorm | None) -> Tensor:
    return x if norm is None else norm.along(x, 0)


@dataclass(slots=True)
class _Observed:
    """One module's last call in the probing pass, and how many there were."""

    arguments: dict[str, Any]
    n_calls: int
    output: Any = None


def fuse_rotary(model: nn.Module, store: KVStore) -> int:
    """Give every attention module that turns q and k as we do the forward above.

    Returns how many. The model must be as before `KVStore.allocate`.
    """
    candidates = [module for module in store.layers if _has_parts(module)]
    n = 0
    for module, observed in _observe(model, store, candidates).items():
        seen = store.seen[module][-1]
        if len(store.seen[module]) != observed.n_calls or len(set(store.layers[module])) > 1:
            continue  # several calls of the attention function in one of the module
        if seen.sinks is not None and module not in store.sinks:
            continue
        if seen.v.shape[3] != seen.q.shape[3]:
            continue
        if not _has_angles(observed.arguments, seen) or not _norms_heads(module, seen):
            continue
        fused = RotaryAttention(module, store, seen)
        if _agrees(fused, observed, seen):
            module.forward = fused
            n += 1
    store.seen.clear()
    return n


def _observe(
    model: nn.Module, store: KVStore, modules: Sequence[nn.Module]
) -> dict[nn.Module, _Observed]:
    """One forward pass, in which the attention function returns q."""
    found: dict[nn.Module, _Observed] = {}
    if not modules:
        return found

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = kwargs | ({"hidden_states": args[0]} if args else {})
        n_before = found[module].n_calls if module in found else 0
        found[module] = _Observed(arguments, n_before + 1)

    def after(module: nn.Module, _: Any, output: Any) -> None:
        found[module].output = output

    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
    try:
        device = next(iter(store.seen.values()))[0].q.device
        positions = torch.tensor([POSITIONS], device=device)
        with torch.inference_mode(), store.probing():
            model(
                input_ids=torch.arange(len(POSITIONS), device=device).unsqueeze(0),
                position_ids=positions,
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _has_parts(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if not all(isinstance(children.get(name), DeltaLinear) for name in PROJECTIONS):
        return False
    if not all(isinstance(children.get(name), DeltaNorm | None) for name in NORMS):
        return False
    if runs_by_slot(module):
        return False
    return set(children) <= {*PROJECTIONS, *NORMS}


def _norms_heads(module: nn.Module, seen: ProbedCall) -> bool:
    """Whether what norms there are take one head at a time, not all of them (OLMo 2)."""
    norms = [getattr(module, name, None) for name in NORMS]
    return all(n is None or n.weight.shape == seen.q.shape[-1:] for n in norms)


def _has_angles(arguments: dict[str, Any], seen: ProbedCall) -> bool:
    angles = arguments.get("position_embeddings")
    if not isinstance(angles, tuple) or len(angles) != 2:
        return False
    wanted = (1, len(POSITIONS))
    return all(
        isinstance(t, Tensor)
        and t.dim() == 3
        and t.shape[:2] == wanted
        and t.shape[2] <= seen.q.shape[3]
        for t in angles
    )


def _agrees(fused: RotaryAttention, observed: _Observed, seen: ProbedCall) -> bool:
    x, (cos, sin) = observed.arguments["hidden_states"], observed.arguments["position_embeddings"]
    if not isinstance(observed.output, tuple) or len(observed.output) != 2:
        return False
    with torch.inference_mode():
        q, k, v = fused.project(x)
        q, k = (rotate(t, Rotary(cos[0], sin[0]), torch.float32) for t in (q, k))
        pairs = [(q, seen.q), (k, seen.k), (v, seen.v)]
        alike = [_close(ours, theirs[0].transpose(0, 1)) for ours, theirs in pairs]
        return all(alike) and _close(fused.output(q), observed.output[0])


def _close(ours: Tensor, wanted: Tensor) -> bool:
    if ours.shape != wanted.shape:
        return False
    bound = TOLERANCE * float(wanted.abs().max())
    return torch.allclose(ours.float(), wanted.float(), rtol=TOLERANCE, atol=bound)
