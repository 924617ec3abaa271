"""Load the base model from its Hugging Face definition and make its layers delta-aware."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compressor.checkpoint.dense_model import load_causal_lm
from compressor.errors import CheckpointError
from server.deltas.parameter import DeltaParameter
from server.deltas.residency import Residency
from server.errors import ConfigError
from server.model.attention import ATTENTION_NAME, attach_store, register_attention
from server.model.context import StepContext
from server.model.definition import Definition
from server.model.embedding import count_positions
from server.model.fused_attention import fuse_rotary
from server.model.fused_layer import fuse_residuals
from server.model.install import fuse_mlps, install_delta_layers
from server.model.kv_store import KVStore
from server.model.mask import use_attention
from server.model.observe import observe
from server.model.own_attention import own_forwards
from server.model.own_values import owners_in, serve_own_values
from server.model.probe import learn_attention, probe, tables_counted
from server.model.refusal import in_a_line, not_served, refused
from server.model.row_positions import count_by_positions
from server.model.sinks import serve_sinks
from server.model.state import keeps_state
from server.model.text_only import noting_modules, take_out_unreached
from server.model.varying_rope import VaryingRope, varying_rope
from server.ops.alone import alone_if_small
from server.ops.choose import KernelChoice, choose_kernels
from server.ops.kernels import CompileKernels, Kernels
from server.ops.precision import cpu_precision, gigabytes, host_cpu, name_of
from server.ops.quantize import BaseQuant, has_float8

log = logging.getLogger(__name__)
DEFAULT_POSITIONS = 2048  # of a configuration that names no limit


@dataclass(slots=True)
class BaseModel:
    """The one model in device memory.

    parameters  every parameter that can carry a delta, by its name in the checkpoint (a tied
                weight appears under both names with the same object)
    definition  what the self-check compares with; nobody needs it afterwards
    keeps_rows  whether it gives the logits of the wanted rows alone when asked to
    is_intercepted  whether its definition multiplies queries and keys itself (`OwnAttention`)
    """

    model: PreTrainedModel
    context: StepContext
    store: KVStore
    parameters: dict[str, DeltaParameter]
    residency: Residency
    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_len: int
    varying_rope: VaryingRope | None = None
    definition: Definition | None = None
    keeps_rows: bool = True
    is_intercepted: bool = False


def weight_bytes(parameters: Iterable[DeltaParameter]) -> int:
    """Device memory of the base's weights that deltas can change: all of them, usually."""
    return sum(parameter.n_base_bytes for parameter in set(parameters))


def load_base_model(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    kernels: KernelChoice | Kernels = "auto",
    base_quant: BaseQuant | None = None,
    *,
    compile_kernels: CompileKernels = "wait",
    widened_budget_bytes: int | None = None,
) -> BaseModel:
    """Load, check that the engine can run this architecture, and replace its layers.

    dtype    None: as stored, or float32 on a CPU where that is faster (`cpu_precision`)
    kernels  by name, or ready ones
    compile_kernels  see `choose_kernels`
    widened_budget_bytes  the most that weights may take which are widened so; None: any

    Raises ConfigError naming what is not supported.
    """
    name = _architecture(_check_config(path))
    transformers_logging.disable_progress_bar()  # it would write into the server's log
    register_attention()
    with refused(name, "loading it"):
        model = _loaded(path, device, dtype)
    if dtype is None and device.type == "cpu":
        _widen_if_faster(model, widened_budget_bytes)
    if base_quant == "float8" and not has_float8(device):
        raise ConfigError("this GPU has no float8 (compute capability 8.9); use --base-quant int8")
    if isinstance(kernels, str):
        kernels = _kernels(kernels, device, model.dtype, compile_kernels)
    return prepare_base_model(model, kernels, base_quant)


def prepare_base_model(
    model: PreTrainedModel, kernels: Kernels, base_quant: BaseQuant | None = None
) -> BaseModel:
    """Make a model that lies on its device, with `ATTENTION_NAME`'s attention, delta-aware.

    Raises ConfigError if the engine cannot run its architecture.
    """
    stateful = keeps_state(model)
    if stateful is not None:
        raise not_served(
            model, f"{stateful} keeps state outside attention, for which there are no slots"
        )
    n_bytes = sum(weight.nbytes for weight in model.parameters())
    with refused(model, "making its layers ready for deltas"), alone_if_small(n_bytes):
        return _prepared(model, kernels, base_quant)


def _prepared(model: PreTrainedModel, kernels: Kernels, base_quant: BaseQuant | None) -> BaseModel:
    _without_padding_check(model)
    text_config = model.config.get_text_config()
    n_positions = getattr(text_config, "max_position_embeddings", None) or DEFAULT_POSITIONS
    context, store = StepContext(), KVStore(kernels, int(n_positions))
    residency = Residency(base_quant=base_quant)
    table, dtype = model.get_input_embeddings().weight, model.dtype
    apart = KVStore(kernels, int(n_positions))  # of these passes alone
    attach_store(model, apart)
    with noting_modules(model) as ran:  # before anything else is asked of the definition
        own = learn_attention(model, apart)
    counted = tables_counted(model, apart)
    unreached = take_out_unreached(model, ran, lambda: probe(model, apart))
    with own_forwards(own):
        definition = Definition(model)
    n_counting = count_by_positions(model)
    owners = owners_in(model, ran)
    with apart.probing():
        seen = observe(model, {module: owner.names for module, owner in owners.items()})
        parameters = install_delta_layers(model, context, kernels, residency, seen)
        serve_sinks(model, apart.seen, store, parameters, context, kernels, residency)
        serve_own_values(owners, seen, parameters, context, store, kernels, residency)
    unreached.add_unread(model, owners, seen)
    unreached.add_to(parameters, kernels, residency)
    definition.bind(parameters)
    attach_store(model, store)
    fuse_mlps(model, kernels)
    count_positions(model, counted)
    base = BaseModel(
        model=model,
        context=context,
        store=store,
        parameters=parameters,
        residency=residency,
        kernels=kernels,
        device=table.device,
        dtype=dtype,
        vocab_size=table.shape[0],
        max_len=int(n_positions),
        varying_rope=varying_rope(model),
        definition=definition,
        keeps_rows=seen.keeps,
        is_intercepted=bool(own),
    )
    _limit_length(base)
    n_residual = fuse_residuals(model, lambda: probe(model, store))
    n_fused = fuse_rotary(model, store)
    log.info("%d of %d attention layers are fused", n_fused, len(store.layers))
    if unreached.parts:
        log.info(
            "text does not reach %s of the base, which the server leaves out; what variants make "
            "of %d parameters there has no effect",
            ", ".join(unreached.parts),
            len(unreached.values),
        )
    if n_counting:
        log.info("%d attention layers that count rows are told positions instead", n_counting)
    log.info("the residual additions of %d layers are fused with the norms after them", n_residual)
    return base


def _loaded(path: Path, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    options = {"local_files_only": True, "use_safetensors": True}
    try:
        try:
            model = load_causal_lm(path, dtype, attn_implementation=ATTENTION_NAME, **options)
        except KeyError as error:  # of a definition with a class for each attention it knows
            if ATTENTION_NAME not in error.args:
                raise
            model = load_causal_lm(path, dtype, attn_implementation="eager", **options)
            use_attention(model, ATTENTION_NAME)
        loaded: PreTrainedModel = model.eval().requires_grad_(False).to(device)
    except CheckpointError as error:
        raise ConfigError(f"the base cannot be loaded: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:  # the last where memory does not suffice
        raise ConfigError(f"the base cannot be loaded: {in_a_line(error)}") from error
    return loaded


def _widen_if_faster(model: PreTrainedModel, budget_bytes: int | None) -> None:
    """Let products run in what this CPU is fast in, and say so."""
    stored = model.dtype
    n_weights = sum(weight.numel() for weight in model.parameters())
    budget_bytes = sys.maxsize if budget_bytes is None else budget_bytes
    found = cpu_precision(stored, n_weights, budget_bytes, host_cpu())
    if found.warning is not None:
        log.warning("%s", found.warning)
    if found.dtype is stored:
        return
    model.to(found.dtype)
    log.info(
        "the weights take %s in %s instead of %s in %s: this CPU multiplies them several times as "
        "fast so; --dtype %s keeps them small",
        gigabytes(n_weights * found.dtype.itemsize),
        name_of(found.dtype),
        gigabytes(n_weights * stored.itemsize),
        name_of(stored),
        name_of(stored),
    )


def _kernels(
    choice: KernelChoice,
    device: torch.device,
    dtype: torch.dtype,
    compile_kernels: CompileKernels,
) -> Kernels:
    try:
        chosen = choose_kernels(choice, device, dtype, compile_kernels)
    except ValueError as error:
        raise ConfigError(f"--kernels {choice}: {error}") from error
    log.info("the server uses the %s kernels", chosen.name)
    return chosen


def _check_config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise ConfigError("the base directory holds no config.json; give a Hugging Face directory")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"transformers cannot read the base's config.json: {in_a_line(error)}"
        ) from error
    if getattr(config, "auto_map", None):
        raise ConfigError(
            "this base model needs code from its repository (auto_map), which the server never "
            "runs; serve a base whose class transformers has"
        )
    return config


def _architecture(config: PreTrainedConfig) -> str:
    named = getattr(config, "architectures", None)
    return str(named[0]) if named else f"a model of type {config.model_type}"


def _without_padding_check(model: nn.Module) -> None:
    """Some definitions look at the ids for padding, to warn of a missing mask: there is none here,
    and looking waits for the device, which a graph under capture must not.
    """
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            vars(module)["warn_if_padding_and_no_attention_mask"] = lambda *_: None


def _limit_length(base: BaseModel) -> None:
    rope = base.varying_rope
    if rope is not None and base.max_len > rope.n_fixed:
        log.warning(
            "the angles of %s rotary embedding depend on what else is in a step past %d tokens: "
            "the server limits sequences to that length instead of %d",
            rope.kind,
            rope.n_fixed,
            base.max_len,
        )
        base.max_len = rope.n_fixed
