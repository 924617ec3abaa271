"""Command line and environment -> Settings: a flag and an ``IMPART_*`` variable for each.

typer shows the flags and pydantic-settings reads the variables; both hand over text, which
Settings alone parses and checks. pydantic-settings has a command line of its own, which is not
used: it names types of Python where a person wants SIZE or SECONDS, shows 4294967296 for 4GiB and
answers a wrong value with a traceback.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import SecretStr, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict
from typer.core import TyperCommand

from compressor import __version__
from server.errors import ConfigError
from server.setting_kinds import Unit, WhenUnset, size_text
from server.settings import GROUPS, Settings

PREFIX = "IMPART_"
SWITCH = "SWITCH"
UNGROUPED = ("version", "help")  # options that are no settings
# Those that take one of several; the others are named as they are.
FLAGS = {
    "mode_overrides": "--mode-override",
    "allow_sources": "--allow-source",
    "require_signature": "--require-signature",
}


@dataclass(frozen=True, slots=True)
class Declaration:
    """What Settings says about one setting, as text for people."""

    name: str
    kind: str  # SIZE, SECONDS, auto|cpu|cuda, ...
    default: str
    meaning: str
    is_required: bool

    @property
    def flag(self) -> str:
        """The flag; of a switch that is on, also the one that turns it off."""
        flag = FLAGS.get(self.name, f"--{self.name.replace('_', '-')}")
        return f"{flag}/--no-{flag[2:]}" if self.default == "on" else flag


def declarations() -> Iterator[Declaration]:
    """Every setting, in the order of Settings."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    for name, field in Settings.__pydantic_fields__.items():  # type: ignore[attr-defined]
        notes = list(_notes(hints[name]))
        unset = next((note.meaning for note in notes if isinstance(note, WhenUnset)), None)
        default = unset or _default_text(name, field.default)
        kind = next(note for note in notes if isinstance(note, str))
        yield Declaration(name, kind, default, field.description, field.is_required())


def app(serve: Callable[[Settings], None]) -> typer.Typer:
    """Return the command line that ends in `serve`.

    In plain text: rich's table of four columns cuts long flags short on a usual terminal.
    """
    line = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    line.command(cls=GroupedCommand)(command(serve))
    return line


class GroupedCommand(TyperCommand):
    """A command whose help shows the options by `GROUPS`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options; the arguments' types are click's, of which typer has its own copy."""
        groups: dict[str, list[tuple[str, str]]] = {}
        heading = ""
        for parameter in self.get_params(ctx):
            heading = GROUPS.get(parameter.name or "", heading)
            if parameter.name in UNGROUPED:
                heading = "Help"
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def command(serve: Callable[[Settings], None]) -> Callable[..., None]:
    """Return `serve` with one keyword parameter per setting, as typer wants it."""

    def entry(version: bool, **flags: Any) -> None:
        del version  # it has ended the program, if it was given
        given = {name: value for name, value in flags.items() if value not in (None, [])}
        try:
            settings = Settings(**with_environment(given))
        except ConfigError as error:
            raise typer.BadParameter(error.message) from None
        serve(settings)

    parameters = [*(_parameter(declared) for declared in declarations()), _version_parameter()]
    entry.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    entry.__annotations__ = {p.name: p.annotation for p in parameters}
    entry.__doc__ = (
        "Serve one base model and every delta of a directory over HTTP.\n\n"
        f"A flag --like-this can also be given as a variable {PREFIX}LIKE_THIS (a switch as 1 or "
        "0); the flag wins. A SIZE is 500MB, 4GiB or a number of bytes.\n\n"
        "impart-serve compile [--help] compiles the CPU kernels ahead, impart-serve keys [--help] "
        "makes keys for tenants, impart-serve usage [--help] shows what was used."
    )
    return entry


def with_environment(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what flags gave, and the text of ``IMPART_*`` variables for the other settings."""
    names: dict[str, Any] = {declared.name: (Any, None) for declared in declarations()}
    complete = create_model("Complete", __base__=_Environment, **names)(**given)
    return complete.model_dump(exclude_none=True)


class _Environment(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, enable_decoding=False
    )


def _notes(hint: Any) -> Iterator[str | WhenUnset]:
    """What a type says of itself for people: its kind, and what is done if it is not given."""
    if typing.get_origin(hint) is Literal:
        yield "|".join(typing.get_args(hint))
    elif typing.get_origin(hint) is Annotated:
        for note in hint.__metadata__:
            if isinstance(note, Unit):
                yield note.name
            elif isinstance(note, WhenUnset):
                yield note
        yield from _notes(hint.__origin__)
    elif hint in (bool, Path, str):
        yield {bool: SWITCH, Path: "PATH", str: "TEXT"}[hint]
    else:
        for part in typing.get_args(hint):
            yield from _notes(part)


def _default_text(name: str, default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if name.endswith("_bytes"):
        return size_text(default)
    if isinstance(default, int | float):
        return f"{default:g}"
    if isinstance(default, SecretStr):  # what everybody has is no secret
        return default.get_secret_value()
    return default if isinstance(default, str) else "none"


def _version_parameter() -> inspect.Parameter:
    def show(asked: bool) -> None:
        if asked:
            typer.echo(f"impart-serve {__version__}")
            raise typer.Exit

    option = typer.Option("--version", callback=show, is_eager=True, help="Print the version.")
    return inspect.Parameter(
        "version",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, option],
    )


def _parameter(declared: Declaration) -> inspect.Parameter:
    is_switch, is_list = declared.kind == SWITCH, declared.name in FLAGS
    default = "required" if declared.is_required else f"default: {declared.default}"
    option = typer.Option(
        declared.flag,
        help=f"{declared.meaning}  [{default}]",
        metavar=None if is_switch else declared.kind,
        show_default=False,
    )
    kind: Any = bool if is_switch else list[str] if is_list else str
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
