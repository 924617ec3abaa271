"""The command line: defaults, flags, the environment, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from server import cli
from server.settings import Settings


def settings_from(*arguments: str, env: dict[str, str] | None = None) -> Settings:
    seen: list[Settings] = []
    app = typer.Typer(add_completion=False)
    app.command()(cli.command(seen.append))
    result = CliRunner().invoke(app, list(arguments), env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def exit_code(*arguments: str) -> int:
    app = typer.Typer(add_completion=False)
    app.command()(cli.command(lambda _: None))
    return CliRunner().invoke(app, list(arguments)).exit_code


def test_cli_without_options_gives_the_defaults_of_settings():
    assert settings_from("--base", "b") == Settings(base=Path("b"))


def test_cli_every_field_has_help_and_a_flag():
    assert set(cli.HELP) == {field.name for field in dataclasses.fields(Settings)}


def test_cli_reads_flags_of_every_kind():
    found = settings_from(
        *("--base", "b", "--deltas", "d", "--port", "9000", "--device", "cpu"),
        *("--delta-budget-bytes", "500MB", "--kv-cache-bytes", "1.5GiB", "--max-body-bytes", "7"),
        *("--mode-override", "a=reconstruct", "--mode-override", "b=apply"),
        *("--max-model-len", "128", "--drain-timeout-s", "1.5", "--log-format", "json"),
    )

    assert found.delta_budget_bytes == 500_000_000
    assert found.kv_cache_bytes == 3 << 29
    assert found.max_body_bytes == 7
    assert found.mode_overrides == {"a": "reconstruct", "b": "apply"}
    assert (found.deltas, found.port, found.device) == (Path("d"), 9000, "cpu")
    assert (found.max_model_len, found.drain_timeout_s) == (128, 1.5)


def test_cli_switches_off_what_is_on():
    found = settings_from("--base", "b", "--no-prefix-cache", "--no-async-scheduling")
    assert (found.prefix_cache, found.async_scheduling) == (False, False)


def test_cli_reads_the_environment_and_flags_win():
    env = {
        "IMPART_BASE": "b",
        "IMPART_PORT": "9001",
        "IMPART_HOST": "0.0.0.0",
        "IMPART_KV_CACHE_BYTES": "2GiB",
        "IMPART_MODE_OVERRIDES": "a=reconstruct b=apply",
    }
    found = settings_from("--port", "9002", env=env)

    assert (found.base, found.port, found.host) == (Path("b"), 9002, "0.0.0.0")
    assert found.kv_cache_bytes == 2 << 30
    assert found.mode_overrides == {"a": "reconstruct", "b": "apply"}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--base", "b", "--kv-cache-bytes", "lots"),
        ("--base", "b", "--kv-cache-bytes", "-1"),
        ("--base", "b", "--kv-cache-bytes", "0"),
        ("--base", "b", "--device", "tpu"),
        ("--base", "b", "--mode-override", "a=magic"),
        ("--base", "b", "--mode-override", "a"),
        ("--base", "b", "--port", "70000"),
        ("--base", "b", "--unknown", "1"),
    ],
)
def test_cli_wrong_values_exit_with_2(arguments):
    assert exit_code(*arguments) == 2


@pytest.mark.parametrize("size", ["4GiB", "512MiB", "1KiB", "1000"])
def test_size_text_is_read_back_as_written(size):
    assert cli.size_text(cli.parse_size(size)) == size
