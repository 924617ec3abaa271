"""What the subcommands show on a terminal and say where they fail."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unprivileged import forbid, open_folder, run_unprivileged

BAR = re.compile(r"(\w[\w -]*?) +[━╸╺ ]+ +(\d+)%")
IMPORTS = """
import sys
from compressor.checkpoint.files import Checkpoint
from compressor.cli.common import reporting
"""
PROGRAM = """
import atexit, sys
heavy = ("torch", "transformers", "numpy")
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules)))
from compressor.cli import main
main()
"""
FEW_TOKENS = """
import compressor.auto.bench as bench, compressor.auto.texts as texts
texts._MEASURED_TOKENS, bench._FISHER_TOKENS = 250, 120
from compressor.cli import main
main()
"""
OPEN = """
reporting(lambda: Checkpoint(sys.argv[1]))()
"""


def on_terminal(*arguments: object) -> str:
    """What a command writes to a terminal of 50 lines."""
    screen, terminal = pty.openpty()
    command = [sys.executable, "-c", FEW_TOKENS, *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "50", "NO_COLOR": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        written = b""
        try:
            while part := os.read(screen, 65536):
                written += part
        except OSError:  # the other end is closed
            pass
    os.close(screen)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_bars_of_auto_name_every_stage_and_none_ends_before_all_is_done(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    shown = on_terminal("compress", tiny_llama, tiny_llama_ft, tmp_path / "out", "--ratio", "12")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    last = {stage.strip(): int(percent) for stage, percent in BAR.findall(plain)}
    assert {"load", "self-written", "gradients", "survey", "try 4 of 4", "write"} <= last.keys()
    assert set(last.values()) == {100}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("compress /nowhere MODEL OUT", "/nowhere: no such directory"),
        ("compress MODEL EMPTY OUT", "no config.json; not a Hugging Face model"),
        ("compress MODEL FILE OUT", "is a file"),
        ("import MODEL /nowhere OUT", "/nowhere: no such directory"),
        ("reconstruct MODEL /nowhere OUT", "nowhere cannot be opened as a directory"),
        ("export MODEL EMPTY OUT --to hf", "no SHA256SUMS here"),
        ("inspect EMPTY", "no SHA256SUMS here"),
        ("verify EMPTY --base MODEL", "no SHA256SUMS here"),
        ("eval MODEL /nowhere EMPTY", "/nowhere: no such directory"),
        ("report MODEL /nowhere EMPTY OUT.html", "/nowhere: no such directory"),
        ("merge MODEL /nowhere OUT", "/nowhere: no such directory"),
        ("merge MODEL MODEL MODEL/out --overwrite", "which is read and must stay as it is"),
        ("compress MODEL MODEL MODEL/ --overwrite", "which is read and must stay as it is"),
        ("merge MODEL MODEL MODEL/..", "which is read and must stay as it is"),
        ("merge MODEL MODEL FILE", "which is read and must stay as it is"),
        ("reconstruct MODEL EMPTY FILE", "no SHA256SUMS here"),
    ],
)
def test_wrong_path_is_said_before_torch_is_imported(
    tiny_llama: Path, tmp_path: Path, arguments: str, says: str
) -> None:
    (tmp_path / "empty").mkdir()
    for word, path in (
        ("MODEL", tiny_llama),
        ("EMPTY", tmp_path / "empty"),
        ("FILE", tiny_llama / "config.json"),
        ("OUT", tmp_path / "out"),
    ):
        arguments = arguments.replace(word, str(path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "imported:\n"


def test_weights_that_this_user_may_not_read_are_named_in_one_line(tiny_llama: Path) -> None:
    with open_folder() as folder:
        model = Path(shutil.copytree(tiny_llama, folder / "model"))
        model.chmod(0o755)
        for file in model.iterdir():
            file.chmod(0o644)
        forbid(model / "model.safetensors")
        done = run_unprivileged(IMPORTS, OPEN, [str(model)])
    assert "typer" not in done.stdout
    assert f"impart: error: {model}/model.safetensors may not be read" in done.stderr
    assert "chmod -R a+rX" in done.stderr
