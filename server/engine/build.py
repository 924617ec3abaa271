"""From settings to an engine: the one place that puts base, variants, KV cache and core together.

The server, the tests and the benchmarks all build theirs here. What they want otherwise - kernels
on a clock, a base without a directory, steps over static buffers on a CPU - is a parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from compressor.artifact.files import GENERATION
from compressor.artifact.identity import base_identity
from compressor.artifact.servable import ServedBase, check_servable
from compressor.artifact.settings_files import check_settings_file
from compressor.artifact.signature import PublicKey, load_public_key
from compressor.errors import Corrupt, InputError
from compressor.usable_cpus import Threads, product_threads
from compressor.usable_memory import usable_memory_bytes
from server.deltas.loads import Happening, LoadJob
from server.deltas.registry import DeltaRegistry
from server.deltas.staging import decode_threads
from server.engine.catalog import VariantCatalog
from server.engine.check.selfcheck import Wanted, check_engine
from server.engine.core import EngineCore
from server.engine.history import VariantHistory
from server.engine.kernel_swap import KernelSwap
from server.engine.lifecycle import Events
from server.engine.memory import allocate_kv_blocks, with_kv_cache
from server.engine.observer import Observer
from server.engine.step.runner import Runner
from server.engine.step.static_step import BUCKETS
from server.engine.variant import Variant
from server.errors import ConfigError, DeltasUnreadable
from server.fleet.folder import managed_path
from server.model.base import BaseModel, load_base_model
from server.ops.kernels import Kernels
from server.ops.precision import host_cpu, name_of
from server.setting_kinds import GIB
from server.settings import Settings, check_kv_cache, check_max_model_len
from server.text.loading import load_base_text
from server.text.service import TextService

log = logging.getLogger(__name__)
Publish = Callable[[Events], None]
ChooseSteps = Callable[[Runner, Settings], None]


@dataclass(frozen=True, slots=True)
class CoreParts:
    """An engine core and what it runs.

    settings  with `max_model_len` decided: a request must fit into the KV cache alone
    """

    settings: Settings
    runner: Runner
    core: EngineCore


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A core that serves the variants of a directory; `settings` as in `CoreParts`.

    swap  waits to be started, once the core is
    """

    settings: Settings
    base: BaseModel
    catalog: VariantCatalog
    history: VariantHistory
    core: EngineCore
    text: TextService
    swap: KernelSwap


def build_engine(
    settings: Settings,
    publish: Publish,
    observer: Observer | None = None,
    *,
    kernels: Kernels | None = None,
    choose_steps: ChooseSteps | None = None,
) -> EngineParts:
    """Load the base, register the deltas and make a core, which nobody has started.

    kernels       instead of those that the settings name
    choose_steps  instead of `graphs_on_cuda`

    Raises ConfigError.
    """
    if device_of(settings).type == "cpu":  # said before the base is loaded
        check_kv_cache(settings, usable_memory_bytes())
    base = load_base(settings, kernels)
    wanted = check_base(base, settings)
    text = TextService(settings)
    catalog = build_catalog(settings, base, text)
    settings = with_kv_cache(settings, base.device)
    history = VariantHistory(catalog.names_of)
    if observer is not None:
        history.timed = observer.on_tier_loaded
    parts = build_core(settings, base, catalog.job_for, publish, observer, choose_steps, history)
    core = parts.core
    swap = KernelSwap(parts.runner, core.slots, core.between_steps, wanted)
    return EngineParts(parts.settings, base, catalog, history, core, text, swap)


def check_base(base: BaseModel, settings: Settings) -> Wanted | None:
    """Check that the engine computes what the definition does, unless that is switched off; return
    what other kernels are to be held to. Raises ConfigError.
    """
    checked = check_engine(base, settings.kv_block_tokens) if settings.self_check else None
    base.definition = None
    return None if checked is None or base.kernels.state != "compiling" else checked.wanted


def load_base(settings: Settings, kernels: Kernels | None = None) -> BaseModel:
    """Load the base onto its device. Raises ConfigError."""
    if not settings.base.is_dir():
        raise ConfigError("the base is not a directory; give a Hugging Face model directory")
    if settings.deltas is not None and not settings.deltas.is_dir():
        raise ConfigError("the deltas path is not a directory")
    device = device_of(settings)
    log.info("the server loads the base onto %s", _device_text(device))
    base = load_base_model(
        settings.base,
        device,
        None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        kernels or settings.kernels,
        None if settings.base_quant == "none" else settings.base_quant,
        compile_kernels=settings.compile_kernels,
        widened_budget_bytes=_widened_budget(settings),
    )
    check_max_model_len(settings, base.max_len)
    return base


def build_catalog(settings: Settings, base: BaseModel, text: TextService) -> VariantCatalog:
    """Register the variants of the deltas directory, none of them opened. Raises ConfigError."""
    _check_generation_config(settings)
    name = settings.served_base_name or settings.base.resolve().name
    identity = base_identity(settings.base)
    served = _served_base(base)
    registry = DeltaRegistry(
        settings.deltas,
        identity,
        reserved=frozenset({name}),
        check=lambda config: check_servable(config.tensors, served),
        signers=_signers(settings),
        managed=managed_path(settings.state_dir),
    )
    try:
        registry.rescan()
    except DeltasUnreadable as error:
        raise ConfigError(error.message) from error
    return VariantCatalog(
        settings,
        registry,
        name,
        identity,
        load_base_text(settings.base),
        base.vocab_size,
        text,
        read_threads=decode_threads(base.device),
    )


def _signers(settings: Settings) -> list[PublicKey]:
    try:
        return [load_public_key(file) for file in settings.require_signature]
    except InputError as error:
        raise ConfigError(f"require_signature: {error}") from error


def _served_base(base: BaseModel) -> ServedBase:
    table = base.model.get_input_embeddings()
    paths = [path for path, module in base.model.named_modules() if module is table]
    names, embeddings = base.parameters.keys(), {f"{path}.weight" for path in paths}
    return ServedBase(names, embeddings, base.vocab_size)


def build_core(
    settings: Settings,
    base: BaseModel,
    job_for: Callable[[Variant], LoadJob],
    publish: Publish,
    observer: Observer | None = None,
    choose_steps: ChooseSteps | None = None,
    watch: Callable[[Happening], None] = lambda happening: None,
) -> CoreParts:
    """Reserve the KV cache, whose size the settings know, and make a core over it.

    job_for  how the loader gets a variant's bytes
    watch    is told what happens to variants
    """
    kv_blocks = allocate_kv_blocks(base, settings)
    room = kv_blocks.n_kv_blocks * kv_blocks.block_tokens
    longest = min(settings.max_model_len or base.max_len, room)
    settings = replace(settings, max_model_len=longest)
    runner = Runner(base)
    (choose_steps or graphs_on_cuda)(runner, settings)
    core = EngineCore(runner, settings, kv_blocks, job_for, publish, observer, watch)
    return CoreParts(settings, runner, core)


def graphs_on_cuda(runner: Runner, settings: Settings) -> None:
    """CUDA graphs for decode steps, where the device and the kernels have them."""
    base = runner.base
    if base.device.type != "cuda" or settings.enforce_eager:
        return
    if not base.kernels.takes_data(base.device):
        name = base.kernels.name
        log.warning("the %s kernels cannot run in CUDA graphs: decoding is slower", name)
        return
    assert settings.max_model_len is not None, "see `build_core`"
    max_rows = min(settings.max_num_seqs, BUCKETS[-1])
    log.info("the server captures CUDA graphs of decode steps; that takes some seconds")
    runner.use_static(max_rows=max_rows, max_len=settings.max_model_len)
    runner.capture()


def use_threads(settings: Settings) -> Threads:
    """Set torch's number of threads, which is the process's; return it and the reason for it."""
    threads = product_threads(settings.torch_threads)
    if torch.get_num_threads() != threads.count:  # setting it starts a pool nobody uses
        torch.set_num_threads(threads.count)
    return threads


def log_cpu(base: BaseModel, threads: Threads) -> None:
    """Say what computes the products."""
    on_cpu = base.device.type == "cpu"
    products = f"{host_cpu().description}; products in {name_of(base.dtype)}; " if on_cpu else ""
    log.info("the server computes with %s%s", products, threads)


def device_of(settings: Settings) -> torch.device:
    """Where the settings want the model. Raises ConfigError if it is not there."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda but torch sees no GPU; use --device cpu")
    return torch.device(settings.device)


def _device_text(device: torch.device) -> str:
    if device.type != "cuda":
        return "the CPU"
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return f"the GPU {name} ({free / GIB:.1f} of {total / GIB:.1f} GiB are free)"


def _check_generation_config(settings: Settings) -> None:
    """The base's own is held to what an artifact's is. Raises ConfigError."""
    path = settings.base / GENERATION
    try:
        if path.is_file():
            check_settings_file(GENERATION, path.read_bytes())
    except Corrupt as error:
        raise ConfigError(f"the base cannot be served: {error}; correct the file") from error


def _widened_budget(settings: Settings) -> int:
    """Half of what this process may use, unless the settings say."""
    if settings.widened_weights_bytes is not None:
        return settings.widened_weights_bytes
    return usable_memory_bytes() // 2
