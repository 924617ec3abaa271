"""All server settings in one frozen dataclass. Read from flags and ``IMPART_*`` only here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from server.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Settings:
    """Every field has a unit and a reason.

    mode_overrides maps a variant name to its mode where it differs from `mode`.
    """

    base: Path
    deltas: Path | None = None
    served_base_name: str | None = None  # default: the base folder's name
    host: str = "127.0.0.1"
    port: int = 8000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: see below
    # The most that weights may take in float32 where they are widened: with dtype auto, on a CPU
    # that multiplies the stored format slowly. Default: half of the memory this process may use.
    widened_weights_bytes: int | None = None
    kernels: Literal["auto", "torch", "numba", "triton"] = "auto"  # auto: see choose_kernels
    base_quant: Literal["none", "int8", "float8"] = "none"  # linears in 8 bits, a scale per output
    enforce_eager: bool = False  # no CUDA graphs for decode steps
    async_scheduling: bool = True  # launch a graph's next step before the last's tokens are read
    mode: Literal["apply", "reconstruct"] = "apply"
    mode_overrides: dict[str, Literal["apply", "reconstruct"]] = field(default_factory=dict)
    # Device memory for weights of variants that have whole steps to themselves; 0: none.
    reconstruct_budget_bytes: int = 0
    delta_budget_bytes: int = 4 * GIB  # device memory for resident deltas, LRU beyond
    max_resident_variants: int = 64  # slots
    max_variants_per_step: int = 32  # distinct variants mixed in one engine step
    # Default: 1 GiB on the CPU; on CUDA what base and deltas leave of the share below.
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9  # of the GPU's memory; the rest: activations, graphs
    kv_block_tokens: int = 16
    prefix_cache: bool = True  # requests of one variant share the KV blocks of a common beginning
    max_model_len: int | None = None  # default: the base's own limit
    max_num_seqs: int = 64  # running at once
    # Per engine step: decode first, then prefill chunks. Default: 256 on the CPU, 2048 on CUDA.
    max_batch_tokens: int | None = None
    # Longest step while streams run, relative to one without prefill (then p99 / p50 of the time
    # between tokens stays below it); 0: only max_batch_tokens limits prefill.
    max_prefill_slowdown: float = 2.0
    # Prompts with more tokens to compute are prefilled one at a time, shorter ones overtake them.
    long_prefill_token_threshold: int | None = None  # default: max_batch_tokens
    max_queued_requests: int = 256  # waiting; beyond: 503 + Retry-After
    request_timeout_s: float = 300.0
    drain_timeout_s: float = 30.0
    max_body_bytes: int = 4 << 20
    template_timeout_s: float = 5.0
    heartbeat_timeout_s: float = 10.0  # no layer finished for so long: the engine hangs
    torch_threads: int | None = None  # default: see compressor.usable_cpus
    log_level: str = "info"
    log_format: Literal["plain", "json"] = "plain"

    def __post_init__(self) -> None:
        positive = (
            "delta_budget_bytes",
            "max_resident_variants",
            "max_variants_per_step",
            "widened_weights_bytes",
            "kv_cache_bytes",
            "kv_block_tokens",
            "max_num_seqs",
            "max_batch_tokens",
            "long_prefill_token_threshold",
            "max_queued_requests",
            "request_timeout_s",
            "max_body_bytes",
            "template_timeout_s",
            "torch_threads",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be within 0..1, got {self.gpu_memory_utilization}"
            )
        if self.heartbeat_timeout_s < 1:  # an idle engine beats twice per second
            raise ConfigError(f"heartbeat_timeout_s must be >= 1, got {self.heartbeat_timeout_s}")
        for name in ("drain_timeout_s", "reconstruct_budget_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_prefill_slowdown != 0 and not 1 < self.max_prefill_slowdown < math.inf:
            raise ConfigError(
                f"max_prefill_slowdown must be above 1, or 0 for no limit, "
                f"got {self.max_prefill_slowdown}"
            )
        reconstructs = "reconstruct" in (self.mode, *self.mode_overrides.values())
        if self.base_quant != "none" and (reconstructs or self.reconstruct_budget_bytes):
            raise ConfigError(
                "weights cannot be reconstructed from an 8-bit base: use mode apply without a "
                "reconstruct budget, or base_quant none"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be within 0..65535, got {self.port}")
