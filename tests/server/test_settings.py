"""Settings: what is refused and how that is said, sizes, overrides, and that they are frozen."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.settings import Settings

BASE = Path("b")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "base is required"),
        ({"base": BASE, "bas": BASE}, "bas is not a setting"),
        ({"base": BASE, "port": -1}, "port must be at least 0, got -1"),
        ({"base": BASE, "port": 65536}, "port must be at most 65535, got 65536"),
        ({"base": BASE, "torch_threads": 0}, "torch_threads must be above 0, got 0"),
        ({"base": BASE, "delta_budget_bytes": 0}, "delta_budget_bytes must be above 0, got 0"),
        ({"base": BASE, "heartbeat_timeout_s": 0.5}, "heartbeat_timeout_s must be at least 1"),
        ({"base": BASE, "gpu_memory_utilization": 1.1}, "must be at most 1"),
        ({"base": BASE, "gpu_memory_utilization": 0}, "must be above 0"),
        ({"base": BASE, "request_timeout_s": float("nan")}, "request_timeout_s must be above 0"),
        ({"base": BASE, "drain_timeout_s": -1}, "drain_timeout_s must be at least 0"),
        ({"base": BASE, "max_prefill_slowdown": 1}, "must be above 1, or 0 for no limit, got 1"),
        ({"base": BASE, "max_prefill_slowdown": float("inf")}, "must be above 1, or 0"),
        ({"base": BASE, "mode": "merge"}, "mode must be 'apply' or 'reconstruct', got 'merge'"),
        ({"base": BASE, "mode_overrides": {"a": "x"}}, "mode_overrides.a must be 'apply' or"),
        ({"base": BASE, "prefix_cache": "perhaps"}, "prefix_cache must be true or false"),
        (
            {"base": BASE, "base_quant": "int8", "reconstruct_budget_bytes": 1},
            "weights cannot be reconstructed from an 8-bit base",
        ),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(values, says):
    with pytest.raises(ConfigError) as refused:
        Settings(**values)
    assert says in refused.value.message


def test_two_wrong_settings_are_both_named():
    with pytest.raises(ConfigError, match=r"port must .*; max_num_seqs must "):
        Settings(base=BASE, port=-1, max_num_seqs=0)


def test_settings_read_text_as_flags_and_variables_give_it():
    found = Settings(base="b", port="1", kv_cache_bytes="2MiB", enforce_eager="true")  # type: ignore
    assert (found.base, found.port, found.kv_cache_bytes) == (BASE, 1, 2 << 20)
    assert found.enforce_eager is True


def test_settings_are_frozen_and_a_changed_copy_is_checked_again():
    settings = Settings(base=BASE)
    with pytest.raises(FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]
    assert replace(settings, port=1) == Settings(base=BASE, port=1)
    with pytest.raises(ConfigError):
        replace(settings, port=-1)


def test_settings_import_without_torch():
    code = "import sys, server.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
