"""Command lines of the compared servers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers.cells import variant_names
from benchmarks.peers.errors import PeersError
from benchmarks.peers.systems import SYSTEMS, Site, versions
from compressor.usable_cpus import usable_cpus

N_VARIANTS = 40


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Forty empty variants of each form, and interpreters that only print their arguments."""
    for form in ("deltas", "adapters", "checkpoints"):
        for name in variant_names(N_VARIANTS):
            (tmp_path / "variants" / form / name).mkdir(parents=True)
    for peer in ("transformers", "peft", "vllm"):
        python = tmp_path / peer / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\necho 1.0 2.0 3.0\n")
        python.chmod(0o755)
    return Site(tmp_path / "model", tmp_path, concurrency=32, max_len=576)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_vllm_gets_every_cpu_and_all_adapters_but_32_in_a_step(site: Site) -> None:
    command = SYSTEMS["vllm"].command(site, N_VARIANTS, 8000)
    assert f"OMP_NUM_THREADS={usable_cpus().cpus}" in command
    assert "VLLM_CPU_OMP_THREADS_BIND=nobind" in command
    assert option(command, "--max-loras") == "32"
    assert option(command, "--max-cpu-loras") == str(N_VARIANTS)
    modules = dict(item.split("=") for item in command[command.index("--lora-modules") + 1 :])
    assert list(modules) == variant_names(N_VARIANTS)
    assert all(Path(path).is_dir() for path in modules.values())


def test_vllm_base_alone_has_no_adapters(site: Site) -> None:
    assert "--enable-lora" not in SYSTEMS["vllm"].command(site, 0, 8000)


def test_vllm_preload_is_passed_on_and_recorded(site: Site) -> None:
    loaded = replace(site, preload="/x/libiomp5.so")
    assert "LD_PRELOAD=/x/libiomp5.so" in SYSTEMS["vllm"].command(loaded, 0, 8000)
    assert versions(loaded, "vllm").endswith("torch 3.0, preloaded libiomp5.so")
    assert not [part for part in SYSTEMS["vllm"].command(site, 0, 8000) if "PRELOAD" in part]


def test_ours_has_a_slot_for_every_variant(site: Site) -> None:
    few = SYSTEMS["ours"].command(site, N_VARIANTS, 8000)
    assert option(few, "--max-resident-variants") == "64"
    assert len(list(Path(option(few, "--deltas")).iterdir())) == N_VARIANTS


@pytest.mark.parametrize(("name", "form"), [("transformers", "checkpoints"), ("peft", "adapters")])
def test_static_server_batches_what_is_in_flight(name: str, form: str, site: Site) -> None:
    command = SYSTEMS[name].command(site, 3, 8000)
    assert option(command, "--max-batch") == "32"
    assert Path(option(command, "--variants")).name == f"{form}-3"


def test_python_missing_environment_names_the_remedy(tmp_path: Path) -> None:
    site = Site(tmp_path, tmp_path, 32, 576)
    with pytest.raises(PeersError, match=r"benchmarks\.peers\.setup peft"):
        SYSTEMS["peft"].command(site, 1, 8000)
