"""``impart-serve usage``: tables for people, CSV for machines, refusals in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server import __main__
from server.ledger.database import open_database
from server.ledger.ledger import Ledger
from server.ledger.records import DAY_S
from server.usage import usage_app
from tests.server.ledger.rows import NOON, request_row


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    with Ledger(open_database(tmp_path, None)) as ledger:
        for n in range(3):
            ledger.add(request_row(ended_s=NOON + n * DAY_S, prompt_tokens=1000))
        ledger.add(request_row(tenant="=b", model=""))
    return tmp_path


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(usage_app(), arguments, env=environment)


def test_table_has_a_row_for_each_tenant_and_variant(state_dir: Path) -> None:
    done = run("--state-dir", str(state_dir))
    assert done.exit_code == 0, done.output
    assert [line.split() for line in done.output.splitlines()] == [
        ["tenant", "model", "requests", "prompt_tokens", "cached_tokens", "output_tokens"],
        ["=b", "-", "1", "5", "2", "7"],
        ["acme", "intent", "3", "3,000", "6", "21"],
    ]


def test_days_are_bounded_by_since_and_until_and_the_folder_comes_from_the_environment(
    state_dir: Path,
) -> None:
    days = ("--since", "2026-11-02", "--until", "2026-11-03")
    done = run("--by", "day", *days, "--csv", IMPART_STATE_DIR=str(state_dir))
    assert done.output.splitlines() == [
        "day,requests,prompt_tokens,cached_tokens,output_tokens",
        "2026-11-02,1,1000,2,7",
        "2026-11-03,1,1000,2,7",
    ]


def test_columns_and_rows_are_in_the_order_that_was_asked_for(state_dir: Path) -> None:
    done = run("--state-dir", str(state_dir), "--by", "model,day", "--since", "2026-11-02", "--csv")
    lines = [line.split(",")[:2] for line in done.output.splitlines()]
    assert lines == [["model", "day"], ["intent", "2026-11-02"], ["intent", "2026-11-03"]]


def test_csv_holds_no_formula_and_no_group_is_the_total(state_dir: Path) -> None:
    url = f"sqlite:///{state_dir}/ledger.db"
    done = run("--ledger-url", url, "--by", "tenant", "--tenant", "=b", "--csv")
    assert done.output.splitlines()[1:] == ["'=b,1,5,2,7"]
    assert run("--ledger-url", url, "--by", "").output.splitlines()[1].split()[0] == "4"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --state-dir or --ledger-url"),
        (["--state-dir", "/nowhere"], "there is no /nowhere/ledger.db"),
        (["--state-dir", "STATE", "--by", "nobody"], "is none of tenant, model, key, day"),
        (["--state-dir", "STATE", "--since", "1.11.2026"], "write it as 2026-11-30"),
        (["--ledger-url", "nosuch://u:hunter2@h/d"], "has no driver here"),
    ],
)
def test_mistake_is_said_with_status_2(state_dir: Path, arguments: list[str], says: str) -> None:
    done = run(*[str(state_dir) if one == "STATE" else one for one in arguments])
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert "hunter2" not in done.output
    assert "Traceback" not in done.output


def test_impart_serve_usage_is_no_setting_of_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["impart-serve", "usage", "--help"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0
    assert "impart-serve usage" in capsys.readouterr().out
