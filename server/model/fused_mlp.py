"""The gated MLP of Llama and its kin in fewer passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.model.linear import DeltaLinear
from server.ops.kernels import Kernels

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class GatedMlp:
    """``down(silu(gate(x)) * up(x))`` with the gate's two passes in one."""

    def __init__(self, module: nn.Module, kernels: Kernels) -> None:
        self._gate, self._up, self._down = (module.get_submodule(name) for name in PARTS[:3])
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate(x), self._up(x)
        n = gate.shape[-1]
        hidden = self._kernels.silu_mul(gate.view(-1, n), up.view(-1, n))
        y: Tensor = self._down(hidden.view(gate.shape))
        return y


def fuse_gated_mlp(module: nn.Module, kernels: Kernels) -> bool:
    """Give `module` the forward above if it is such an MLP; whether it is, its results say."""
    gate = getattr(module, "gate_proj", None)
    if set(dict(module.named_children())) != set(PARTS) or not isinstance(gate, DeltaLinear):
        return False
    weight = gate.delta_weight
    x = torch.randn(1, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    probe = torch.linspace(-6, 6, 64, device=x.device)
    if not torch.allclose(module.get_submodule("act_fn")(probe), F.silu(probe)):
        return False
    with torch.inference_mode():
        fused = GatedMlp(module, kernels)
        wanted, ours = module(x).float(), fused(x).float()
    if not torch.allclose(ours, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
        return False
    module.forward = fused
    return True
