"""The ``impart`` command: its subcommands put together.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 bad input or any other
error of ours, 130 interrupted; `check` has 1 for a model that the server refuses.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from compressor import __version__
from compressor.cli.certify import certify
from compressor.cli.check import check_served
from compressor.cli.compress import compress
from compressor.cli.eval import evaluate
from compressor.cli.export import export
from compressor.cli.hub import pull, push
from compressor.cli.import_adapter import import_adapter
from compressor.cli.inspect import inspect, verify
from compressor.cli.merge import merge
from compressor.cli.plan import plan
from compressor.cli.reconstruct import reconstruct
from compressor.cli.report import report
from compressor.cli.sign import keygen, sign
from compressor.usable_cpus import set_thread_defaults

app = typer.Typer(
    name="impart",
    help="Compress full fine-tunes of one base model to small deltas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the console script."""
    set_thread_defaults()  # the commands import torch
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale cannot print is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="impart")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"impart-serve {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress full fine-tunes of one base model to small deltas, and turn them back."""


app.command("check")(check_served)
app.command("compress")(compress)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("reconstruct")(reconstruct)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("merge")(merge)
app.command("export")(export)
app.command("import")(import_adapter)
app.command("certify")(certify)
app.command("keygen")(keygen)
app.command("sign")(sign)
app.command("plan")(plan)
app.command("push")(push)
app.command("pull")(pull)
