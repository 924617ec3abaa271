"""``impart check`` as people start it: what it prints, and its exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from tests.server.engine.check.models import definition


def impart_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compressor", "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_base_and_delta_that_are_served_exactly_are_said_so(
    tiny_llama: Path, tiny_llama_ft_vocab: Path, tmp_path: Path
) -> None:
    out = tmp_path / "delta"
    compress(tiny_llama, tiny_llama_ft_vocab, out, Options(codec="blockdiag", ratio=8.0))
    ended = impart_check(tiny_llama, out)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(f"{tiny_llama}: LlamaForCausalLM is served exactly (to ")
    assert lines[1].startswith(f"{out}: the variant is served exactly (to ")


def test_base_that_the_server_refuses_ends_with_one_and_a_sentence(tmp_path: Path) -> None:
    model = definition("gemma3_text", use_bidirectional_attention=True, sliding_window=8)
    model.save_pretrained(tmp_path)
    ended = impart_check(tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert "not causal: tokens see later ones" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_base_that_is_none_ends_with_two(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    ended = impart_check(tmp_path / name)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
