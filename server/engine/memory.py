"""What a device's memory is for: base, deltas, KV cache, and a rest for activations and graphs."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from compressor.usable_memory import usable_memory_bytes
from server.deltas.pools.places import slack
from server.engine.schedule.kv_blocks import KVBlockPool
from server.errors import ConfigError
from server.model.base import BaseModel
from server.setting_kinds import GIB, size_text
from server.settings import Settings, check_kv_cache

log = logging.getLogger(__name__)
CPU_KV_CACHE_BYTES = 1 * GIB


def with_kv_cache(settings: Settings, device: torch.device) -> Settings:
    """The settings with `kv_cache_bytes` decided. Call when the base is in device memory.

    On a GPU the cache takes, unless told how much, what base and deltas leave of
    `gpu_memory_utilization`. Raises ConfigError where that is nothing, or less than was asked for:
    running out later would fail requests. So it does on a CPU, if more is asked for than is left.
    """
    if device.type != "cuda":
        check_kv_cache(settings, usable_memory_bytes())
        return replace(settings, kv_cache_bytes=settings.kv_cache_bytes or CPU_KV_CACHE_BYTES)
    torch.cuda.empty_cache()  # what loading and quantising the base left behind
    free, total = torch.cuda.mem_get_info(device)
    kept = round((1 - settings.gpu_memory_utilization) * total)
    deltas = round(settings.delta_budget_bytes * (1 + slack(device)))
    deltas += settings.reconstruct_budget_bytes
    room = free - kept - deltas
    wanted = room if settings.kv_cache_bytes is None else settings.kv_cache_bytes
    if room <= 0 or wanted > room:
        asked = "" if settings.kv_cache_bytes is None else f", {_gib(wanted)} are asked for"
        raise ConfigError(
            f"beside the base {_gib(free)} of the GPU's {_gib(total)} are free; {_gib(kept)} stay "
            f"unused (gpu_memory_utilization), {_gib(deltas)} are for deltas: that leaves "
            f"{_gib(max(room, 0))} for the KV cache{asked}; lower delta_budget_bytes or "
            "kv_cache_bytes, raise gpu_memory_utilization, or use base_quant int8"
        )
    log.info("the KV cache gets %s, deltas get %s", _gib(wanted), _gib(deltas))
    return replace(settings, kv_cache_bytes=wanted)


def allocate_kv_blocks(base: BaseModel, settings: Settings) -> KVBlockPool:
    """Reserve the KV cache. Raises ConfigError if it cannot hold one request of a KV block."""
    block_bytes = base.store.bytes_per_token() * settings.kv_block_tokens
    assert settings.kv_cache_bytes is not None, "see `with_kv_cache`"
    n_kv_blocks = settings.kv_cache_bytes // block_bytes
    if n_kv_blocks < 2:
        raise ConfigError(
            f"kv_cache_bytes is {settings.kv_cache_bytes}, but two KV blocks of "
            f"{settings.kv_block_tokens} tokens need {2 * block_bytes} bytes"
        )
    # One more, which nobody is given: padding rows of static steps write there.
    try:
        base.store.allocate(n_kv_blocks + 1, settings.kv_block_tokens, base.device)
    except (RuntimeError, MemoryError) as error:  # torch's own word for both kinds of memory
        raise ConfigError(
            f"kv_cache_bytes is {size_text(settings.kv_cache_bytes)}, and so much memory was not "
            "to be had; lower it"
        ) from error
    return KVBlockPool(n_kv_blocks, settings.kv_block_tokens, reuse=settings.prefix_cache)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f} GiB"
