"""The step profile on a tiny model: every part it wraps must still be where it looks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import profile
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from tests.tiny import make_tiny, perturb


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = make_tiny("llama", tmp_path / "base", seed=1)
    tuned = perturb(base, tmp_path / "tuned", seed=2)
    compress(base, tuned, tmp_path / "deltas" / "one", Options(codec="blockdiag", ratio=8))
    return base, tmp_path / "deltas"


@pytest.mark.parametrize("variants", ["0", "1"])
def test_main_prints_a_share_for_every_part(
    pair: tuple[Path, Path],
    variants: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, deltas = pair
    monkeypatch.setattr(profile, "ID_RANGE", (10, 200))
    profile.main(
        [
            "--base", str(base), "--deltas", str(deltas), "--variants", variants,
            "--kernels", "torch", "--requests", "3", "--concurrency", "2",
            "--prompt-tokens", "8", "--max-tokens", "4",
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "output tok/s" in printed
    parts = {line.split("|")[1].strip(): line for line in printed.splitlines() if "%" in line}
    wanted = {
        "base linears", "sampling", "decode attention", "events",
        "scheduling and batch building", "model: the rest", "engine: the rest",
    }  # fmt: skip
    assert wanted <= set(parts)
    assert ("delta products" in parts) == (variants == "1")
    shares = [float(line.split("|")[2].strip().rstrip("%")) for line in parts.values()]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_main_in_turn_says_what_is_kept_of_the_base_alone(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, deltas = pair
    monkeypatch.setattr(profile, "ID_RANGE", (10, 200))
    ran: list[list[str]] = []
    run = profile.Bench.run

    def noted(bench: profile.Bench, load: profile.Load) -> float:
        ran.append(list(load.models))
        return run(bench, load) and (50.0 if load.models == ["base"] else 40.0)

    monkeypatch.setattr(profile.Bench, "run", noted)
    profile.main(
        [
            "--base", str(base), "--deltas", str(deltas), "--variants", "1", "--in-turn",
            "--kernels", "torch", "--requests", "2", "--concurrency", "2", "--repeats", "2",
            "--prompt-tokens", "8", "--max-tokens", "4",
        ]
    )  # fmt: skip
    assert ran[1:5] == [["base"], ["one"], ["base"], ["one"]]
    assert "of the base alone: 0.800 (0.800 to 0.800)" in capsys.readouterr().out
