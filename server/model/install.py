"""Replace the layers of a definition by their delta-aware forms, on the instance."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.codecs.siblings import SIBLING_PROJECTIONS
from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.model.context import StepContext
from server.model.embedding import DeltaEmbedding, looks_up_rows, make_delta_embedding
from server.model.fused_mlp import fuse_gated_mlp
from server.model.install_experts import install_experts
from server.model.linear import DeltaLinear, Product
from server.model.norm import DeltaNorm
from server.model.observe import Observation
from server.model.own_values import is_plain_linear, runs_by_slot
from server.model.plain_norm import agrees, plain_axes
from server.ops.kernels import Kernels


def install_delta_layers(
    model: PreTrainedModel,
    context: StepContext,
    kernels: Kernels,
    residency: Residency,
    seen: Observation,
) -> dict[str, DeltaParameter]:
    """Replace every linear, embedding and norm by its delta-aware form, on the instance.

    seen  what they got in a forward pass: those that are called otherwise stay as they are
    """
    output = model.get_output_embeddings()
    names = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    shared: dict[int, DeltaParameter] = {}
    parameters: dict[str, DeltaParameter] = {}

    def parameter(name: str, value: Tensor, transposed: bool = False) -> DeltaParameter:
        key = id(value)
        if key not in shared:
            data = value.data.t().contiguous() if transposed else value.data
            shared[key] = DeltaParameter(name, data, kernels, residency)
        elif name not in parameters:
            shared[key].untie(shared[key].name, name)
        parameters[name] = shared[key]
        return shared[key]

    for path, module in list(model.named_modules()):
        weight_name, bias_name = f"{path}.weight", f"{path}.bias"
        kept = seen.sees_kept_rows(module)
        axes = plain_axes(module, seen)
        if isinstance(module, nn.Embedding) and looks_up_rows(module, seen):
            weight = parameter(weight_name, module.weight)
            make_delta_embedding(module, weight, context, kept=kept)
        elif is_plain_linear(module) and not seen.is_only_read(module):
            turned = isinstance(module, Conv1D)
            weight = parameter(weight_name, module.get_parameter("weight"), turned)
            bias = parameter(bias_name, module.bias) if _has_bias(module) else None
            linear = DeltaLinear(weight, bias, context, is_output=module is output, kept=kept)
            _set_module(model, path, linear)
        elif axes is not None and agrees(module, axes, seen, kernels):
            weight = parameter(weight_name, module.get_parameter("weight"))
            bias = parameter(bias_name, module.bias) if _has_bias(module) else None
            _set_module(model, path, DeltaNorm(module, weight, bias, context, axes, kept=kept))
    for name, key in names:  # of a bias that its linear shares with the module around it
        if key in shared:
            parameters.setdefault(name, shared[key])
    for path, module in model.named_modules():
        if isinstance(module, DeltaEmbedding | DeltaLinear):
            module.own = own = parameters[f"{path}.weight"].untied.get(f"{path}.weight")
            if own is not None:
                own.is_multiplied = isinstance(module, DeltaLinear)
                own.is_looked_up = not own.is_multiplied
    _fuse_projections(model)
    _pack_linears(model, model.get_input_embeddings())
    install_experts(model, parameters, context, kernels, residency)
    return parameters


def fuse_mlps(model: nn.Module, kernels: Kernels) -> None:
    """Give the gated MLPs their one call, where no module of them runs once per slot."""
    for module in model.modules():
        if not runs_by_slot(module):
            fuse_gated_mlp(module, kernels)


def _fuse_projections(model: nn.Module) -> None:
    """Join sibling linears, which model definitions feed with one tensor (checked on each call)."""
    for module in model.modules():
        for names in SIBLING_PROJECTIONS:
            members = [getattr(module, name, None) for name in names]
            linears = [m for m in members if isinstance(m, DeltaLinear)]
            if len(linears) == len(names) and len({m.bias is None for m in linears}) == 1:
                Product(linears).pack()


def _pack_linears(model: nn.Module, embedding: nn.Module) -> None:
    """Lay out the weights of linears outside groups; a tied output shares the embedding's."""
    for module in model.modules():
        if isinstance(module, DeltaLinear) and len(module.product.members) == 1:
            read = isinstance(embedding, DeltaEmbedding) and embedding.reads(module.delta_weight)
            module.product.pack(quantise=not (read or module.is_output), keep=read)


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
