"""The composition root: what the settings leave open is decided, and parts can be replaced."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.build import build_core, build_engine, device_of
from server.engine.lifecycle import Events
from server.engine.step.runner import Runner
from server.errors import ConfigError
from server.ops.kernels import TorchKernels
from server.settings import Settings
from tests.server.conftest import PAIR, Served
from tests.server.helpers import FIELDS


def deliver(events: Events) -> None:
    raise AssertionError("nothing was asked")


@pytest.fixture
def settings(served: Callable[..., Served]) -> Settings:
    pair = served("llama", PAIR)
    return Settings(base=pair.base, deltas=pair.deltas, **FIELDS)  # type: ignore[arg-type]


def test_build_engine_names_every_variant_and_decides_the_longest_request(
    settings: Settings,
) -> None:
    parts = build_engine(settings, deliver)
    assert [delta.name for delta in parts.catalog.registry.all()] == ["blockdiag", "impart"]
    assert parts.catalog.base_name == "base"
    assert parts.settings.max_model_len == parts.base.max_len == 512
    parts.core.stop()


def test_build_engine_small_cache_limits_a_request_to_it(settings: Settings) -> None:
    at_ease = build_engine(settings, deliver)
    token_bytes = at_ease.base.store.bytes_per_token()
    small = replace(settings, kv_cache_bytes=5 * 16 * token_bytes)
    parts = build_engine(small, deliver)
    assert parts.settings.max_model_len == 4 * 16, "one of the five is never given out"
    for one in (at_ease, parts):
        one.core.stop()


def test_build_engine_takes_ready_kernels_and_another_choice_of_steps(settings: Settings) -> None:
    kernels, asked = TorchKernels(), []

    def note(runner: Runner, decided: Settings) -> None:
        asked.append(decided.max_model_len)

    parts = build_engine(
        replace(settings, kernels="numba"), deliver, kernels=kernels, choose_steps=note
    )
    assert parts.base.kernels is kernels
    assert asked == [512]
    parts.core.stop()


def test_build_core_takes_a_base_and_variants_from_elsewhere(settings: Settings) -> None:
    base = build_engine(settings, deliver).base
    parts = build_core(replace(settings, base=Path()), base, lambda variant: None, deliver)  # type: ignore[arg-type, return-value]
    assert parts.runner.base is base
    parts.core.stop()


@pytest.mark.parametrize(("field", "text"), [("base", "base"), ("deltas", "deltas path")])
def test_build_engine_without_the_directory_is_refused(
    settings: Settings, tmp_path: Path, field: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        build_engine(replace(settings, **{field: tmp_path / "none"}), deliver)


def test_device_of_auto_is_the_cpu_without_a_gpu(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(replace(settings, device="auto")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        device_of(replace(settings, device="cuda"))


def test_build_engine_refuses_a_base_whose_generation_config_cannot_be_used(
    settings: Settings, tmp_path: Path
) -> None:
    base = shutil.copytree(settings.base, tmp_path / "base")
    (base / "generation_config.json").write_text('{"repetition_penalty": 0}')
    with pytest.raises(ConfigError, match=r"repetition_penalty must be a number from 0\.01"):
        build_engine(replace(settings, base=base), deliver)
