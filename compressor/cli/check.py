"""``impart check``: whether the server serves a base, and a variant of it, exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.common import BaseArg, BaseRevision, look_at, reporting


@reporting
def check_served(
    base: BaseArg,
    delta: Annotated[
        Path | None, typer.Argument(help="Delta artifact directory.", metavar="[DELTA]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="As of impart-serve: auto, float32, ...")] = "auto",
    base_revision: BaseRevision = None,
) -> None:
    """Try whether the server serves BASE, and DELTA, exactly; exit status 1 if it refuses.

    The server's engine runs a few dozen tokens, and what it computes is compared with the model's
    own definition, layer by layer. Worth a minute before a fine-tune is compressed.
    """
    look_at(base, deltas=[] if delta is None else [delta])
    from compressor.checkpoint.hub import with_revision

    arguments = [with_revision(base, base_revision, "--base-revision")]
    arguments += [] if delta is None else [str(delta)]
    # A process of its own, found by its name: nothing here knows the server.
    command = [sys.executable, "-P", "-m", "server.check", "--device", device, "--dtype", dtype]
    raise typer.Exit(subprocess.run([*command, *arguments], check=False).returncode)
