"""How a device's memory is shared out, and what is said where it does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.memory import allocate_kv_blocks, with_kv_cache
from server.errors import ConfigError
from server.model.base import load_base_model
from server.setting_kinds import GIB
from server.settings import Settings

CUDA = torch.device("cuda")
Gpu = Callable[[int, int], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Say how much memory is free, and how much there is."""

    def set_memory(free: int, total: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    return set_memory


def settings(**changes: object) -> Settings:
    return Settings(base=Path("b"), **changes)


def test_cpu_cache_is_a_gib_or_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    assert with_kv_cache(settings(), cpu).kv_cache_bytes == GIB
    assert with_kv_cache(settings(kv_cache_bytes=7), cpu).kv_cache_bytes == 7


def test_cpu_cache_beyond_what_is_left_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_bytes is 9TiB, .* lower it"):
        with_kv_cache(settings(kv_cache_bytes=9 << 40), torch.device("cpu"))


def test_cache_that_cannot_be_reserved_is_refused(tiny_llama: Path) -> None:
    """As on a machine that promises memory and then has none: torch raises a RuntimeError."""
    base = load_base_model(tiny_llama, torch.device("cpu"), torch.float32, "torch")
    with pytest.raises(ConfigError, match="so much memory was not to be had"):
        allocate_kv_blocks(base, settings(kv_cache_bytes=1 << 60))


def test_gpu_cache_takes_what_base_and_deltas_leave(gpu: Gpu) -> None:
    gpu(64 * GIB, 80 * GIB)  # the base has 16
    found = with_kv_cache(settings(delta_budget_bytes=8 * GIB, reconstruct_budget_bytes=GIB), CUDA)
    assert found.kv_cache_bytes == (64 - 8 - 10 - 1) * GIB, "a tenth is kept, arrays have slack"
    more = settings(delta_budget_bytes=8 * GIB, gpu_memory_utilization=1.0)
    assert with_kv_cache(more, CUDA).kv_cache_bytes == (64 - 10) * GIB


def test_gpu_cache_that_was_asked_for_is_left_as_it_is(gpu: Gpu) -> None:
    gpu(64 * GIB, 80 * GIB)
    assert with_kv_cache(settings(kv_cache_bytes=GIB), CUDA).kv_cache_bytes == GIB


@pytest.mark.parametrize(
    "changes", [{"kv_cache_bytes": 14 * GIB}, {"delta_budget_bytes": 16 * GIB}]
)
def test_gpu_without_room_is_refused_naming_the_settings(gpu: Gpu, changes: dict[str, int]) -> None:
    gpu(20 * GIB, 24 * GIB)
    with pytest.raises(ConfigError, match="lower delta_budget_bytes or kv_cache_bytes") as error:
        with_kv_cache(settings(**changes), CUDA)
    assert "20.00 GiB of the GPU's 24.00 GiB are free" in error.value.message


@pytest.mark.parametrize("share", [0.0, 1.1, float("nan")])
def test_share_of_memory_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        settings(gpu_memory_utilization=share)
