"""``python -m server.check BASE [DELTA]``: what ``impart check`` starts.

Loads the base as the server would, and compares the engine with the model's own definition, with
made-up deltas and then with those of an artifact. Exit codes: 0 the server serves it exactly, 1 it
refuses it, 2 bad input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.errors import ImpartError
from compressor.usable_cpus import set_thread_defaults
from server.errors import ConfigError
from server.process.inputs import located
from server.settings import Settings

REFUSED, BAD_INPUT = 1, 2


def check_offline(
    base: str,
    delta: Annotated[Path | None, typer.Argument()] = None,
    device: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Print a line for the base and one for the delta."""
    try:
        settings = located(Settings(base=Path(base), device=device, dtype=dtype))  # type: ignore[arg-type]
    except ConfigError as error:
        raise _ended(error.message, BAD_INPUT) from None
    set_thread_defaults(None)
    _check(settings, delta)


def _check(settings: Settings, delta: Path | None) -> None:
    # Here, because they import torch: mistakes in the arguments are said before.
    from compressor.artifact.identity import base_identity
    from compressor.artifact.reader import read_artifact
    from server.deltas.staging import stage_variant
    from server.engine.build import load_base
    from server.engine.check.selfcheck import check_engine
    from server.engine.check.synthetic import by_parameter

    try:
        identity = None if delta is None else base_identity(settings.base)
        artifact = None if delta is None else read_artifact(delta, base_identity=identity)
    except ImpartError as error:
        raise _ended(str(error), BAD_INPUT) from None
    try:
        model = load_base(settings)
        checked = check_engine(model, settings.kv_block_tokens)
        name = type(model.model).__name__
        typer.echo(f"{settings.base}: {name} is served exactly ({checked})")
        if artifact is not None:
            stage_variant(artifact, model.parameters)
            deltas = by_parameter(artifact.tensors, model.parameters)
            checked = check_engine(model, settings.kv_block_tokens, deltas)
            typer.echo(f"{delta}: the variant is served exactly ({checked})")
    except (ConfigError, ImpartError) as error:
        raise _ended(str(error), REFUSED) from None


def _ended(message: str, code: int) -> typer.Exit:
    typer.echo(f"impart: {message}", err=True)
    return typer.Exit(code)


if __name__ == "__main__":
    typer.run(check_offline)
