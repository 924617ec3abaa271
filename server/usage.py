"""``impart-serve usage``: what was used, from the ledger; the server may run or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, cast

import typer

from server.errors import ServeError
from server.ledger.csv_table import csv_text
from server.ledger.records import DAY_S, Group, UsageQuery, UsageRow

GROUPS = ("tenant", "model", "key", "day")
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
MAX_ROWS = 100_000
FAILED = 2


def usage_app() -> typer.Typer:
    """Return the command line of the subcommand."""
    line = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    line.command()(show_usage)
    return line


def show_usage(
    state_dir: Annotated[
        Path | None, typer.Option(envvar="IMPART_STATE_DIR", help="The server's --state-dir.")
    ] = None,
    ledger_url: Annotated[
        str | None,
        typer.Option(
            envvar="IMPART_LEDGER_URL",
            show_envvar=False,
            help="The server's --ledger-url, better given as the variable IMPART_LEDGER_URL.",
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.")] = None,
    by: Annotated[
        str, typer.Option(help="Sums for each of: tenant, model, key, day, with commas between.")
    ] = "tenant,model",
    since: Annotated[str | None, typer.Option(help="First day (UTC), as 2026-11-01.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day (UTC), as 2026-11-30.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="For machines.")] = False,
) -> None:
    """Show requests and tokens by tenant, variant, key and day.

    Exit codes: 0 it was shown, 2 there is no such ledger or it cannot be read.
    """
    if state_dir is None and ledger_url is None:
        raise typer.BadParameter("give --state-dir or --ledger-url, as the server has it")
    groups = _groups(by)
    query = UsageQuery(
        start_s=0.0 if since is None else _day(since),
        end_s=math.inf if until is None else _day(until) + DAY_S,
        by=groups,
        tenant=tenant,
        limit=MAX_ROWS,
    )
    try:
        rows = _read(None if ledger_url else state_dir, ledger_url, query)
    except ServeError as error:
        typer.echo(f"impart-serve usage: {error.message}", err=True)
        raise typer.Exit(FAILED) from None
    rows.sort(key=lambda row: [getattr(row, name) for name in groups])
    lines = [_cells(row, groups) for row in rows]
    columns = [*groups, *COUNTS]
    typer.echo(csv_text(columns, lines) if as_csv else _table(columns, lines), nl=False)
    if len(rows) == MAX_ROWS:
        typer.echo(
            f"only the first {MAX_ROWS} rows are shown; narrow --since and --until", err=True
        )


def _read(state_dir: Path | None, ledger_url: str | None, query: UsageQuery) -> list[UsageRow]:
    # Here, because they import SQLAlchemy: --help should answer at once.
    from server.ledger.database import open_database
    from server.ledger.ledger import Ledger

    with Ledger(open_database(state_dir, ledger_url, create=False)) as ledger:
        return ledger.usage(query)


def _groups(by: str) -> tuple[Group, ...]:
    names = [name for name in by.split(",") if name]
    for name in names:
        if name not in GROUPS:
            raise typer.BadParameter(f"--by {name!r} is none of {', '.join(GROUPS)}")
    return tuple(cast(Group, name) for name in dict.fromkeys(names))


def _day(text: str) -> float:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no day; write it as 2026-11-30") from None


def _cells(row: UsageRow, groups: Sequence[Group]) -> dict[str, str | int]:
    names = {name: str(getattr(row, name)) for name in groups}
    counts = (row.n_requests, row.prompt_tokens, row.cached_tokens, row.output_tokens)
    return names | dict(zip(COUNTS, counts, strict=True))


def _table(columns: Sequence[str], lines: Sequence[Mapping[str, str | int]]) -> str:
    """Names to the left, numbers with thousands apart to the right."""
    rows = [list(columns), *([_text(line[name]) for name in columns] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ""
    for cells in rows:
        places = zip(columns, cells, widths, strict=True)
        parts = [c.rjust(w) if name in COUNTS else c.ljust(w) for name, c, w in places]
        text += "  ".join(parts).rstrip() + "\n"
    return text


def _text(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value or "-"
