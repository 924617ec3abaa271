"""``impart-serve keys``: a tenant's key is made and shown once; its hash goes into the file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from server.errors import ConfigError
from server.tenants.file import parse_tenants, read_tenants
from server.tenants.keys import default_id, hash_of, new_key

CONFIG_EXIT_CODE = 2


def keys_app() -> typer.Typer:
    """Return the command line of the subcommand."""
    line = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        no_args_is_help=True,
        help="Keys of tenants.",
    )
    line.command()(create)
    line.command("list")(list_keys)
    return line


def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Name of the tenant.")],
    key_id: Annotated[
        str | None,
        typer.Option("--id", help="What log and ledger call the key  [default: of its hash]"),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--tenants", help="TOML file to add the key to; else its lines are printed."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Name or glob that a new tenant may use; may be repeated  [default: *]"),
    ] = None,
) -> None:
    """Make a key for TENANT and print it once.

    The file holds a hash, from which nobody can tell the key. The key is the only thing on standard
    output, so that KEY=$(impart-serve keys create ...) works.
    A running server reads the file again on SIGHUP.
    """
    try:
        _create(tenant, key_id, file, variant or [])
    except ConfigError as error:
        typer.echo(f"impart-serve keys: {error.message}", err=True)
        raise typer.Exit(CONFIG_EXIT_CODE) from None


def list_keys(
    file: Annotated[Path, typer.Option("--tenants", help="The tenants file.")],
) -> None:
    """Check a tenants file and list its keys' ids."""
    try:
        said = read_tenants(file)
    except ConfigError as error:
        typer.echo(f"impart-serve keys: {error.message}", err=True)
        raise typer.Exit(CONFIG_EXIT_CODE) from None
    for name in said.tenants:
        ids = [key.key_id for key in said.keys if key.tenant.name == name]
        typer.echo(f"{name}  {', '.join(ids) or 'no key'}")


def _create(tenant: str, key_id: str | None, file: Path | None, variants: list[str]) -> None:
    key = new_key()
    key_hash = hash_of(key)
    known = read_tenants(file).tenants if file is not None and file.exists() else {}
    if tenant in known and variants:
        raise ConfigError(f"tenant {tenant} is in {file} already; change its variants there")
    lines = _lines(tenant, key_id or default_id(key_hash), key_hash, variants, tenant in known)
    parse_tenants(lines if tenant not in known else f"[tenants.{_quoted(tenant)}]\n{lines}", _TOML)
    if file is None:
        typer.echo(f"Put this into the tenants file:\n\n{lines}", err=True)
    else:
        _append(file, lines)
        typer.echo(f"{file} has the new key's hash; the key itself is:", err=True)
    typer.echo(key)


def _lines(tenant: str, key_id: str, key_hash: str, variants: list[str], is_known: bool) -> str:
    table = f"tenants.{tenant if _BARE.fullmatch(tenant) else _quoted(tenant)}"
    lines = [] if is_known else [f"[{table}]"]
    if variants:
        lines.append(f"variants = [{', '.join(map(_quoted, variants))}]")
    lines += [f"[[{table}.keys]]", f"id = {_quoted(key_id)}", f'sha256 = "{key_hash}"']
    return "\n".join(lines) + "\n"


def _append(file: Path, lines: str) -> None:
    if file.suffix != ".toml":
        raise ConfigError(f"{file}: a key can be added to a .toml file only; leave --tenants out")
    try:
        before = file.read_text() if file.exists() else ""
        text = before + ("\n" if before else "") + lines
        parse_tenants(text, file)  # an inline list of keys cannot be added to
        _replace(file, text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror})") from error


def _replace(file: Path, text: str) -> None:
    """Write the file as a whole: a server that reads it meanwhile sees the old one or the new."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w") as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
        if file.exists():
            shutil.copymode(file, name)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _quoted(text: str) -> str:
    """Return `text` as TOML writes it; what would need escapes is no name here."""
    if '"' in text or "\\" in text or not text.isprintable():
        raise ConfigError(f"{text!r} is no name")
    return f'"{text}"'


_TOML = Path("tenants.toml")
_BARE = re.compile(r"[A-Za-z0-9_-]+")  # what TOML reads without quotes
