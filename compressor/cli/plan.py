"""``impart plan``: whether a base and deltas fit into a memory, before anything is deployed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import look_at, reporting


@reporting
def plan(
    deltas: Annotated[list[Path], typer.Argument(help="Delta artifact directories.")],
    memory: Annotated[str, typer.Option(help="Of the device: 24GiB, 80GB or bytes.")],
    base: Annotated[str, typer.Option(help="Base model: directory or Hub id[@revision].")],
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest request; default: the base's own limit.")
    ] = None,
) -> None:
    """Reckon what BASE and DELTAs take and what is left for KV; exit status 1 if it does not fit.

    By headers and configurations alone, on the safe side: nothing is loaded.
    """
    look_at(base, deltas=deltas)
    arguments = [base, *map(str, deltas), "--memory", memory]
    arguments += [] if max_model_len is None else ["--max-model-len", str(max_model_len)]
    # A process of its own, found by its name: nothing here knows the server.
    command = [sys.executable, "-P", "-m", "server.plan", *arguments]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
