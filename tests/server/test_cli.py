"""The command line: defaults, flags, the environment, what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compressor import __version__
from server import cli
from server.settings import GROUPS, Settings


def settings_from(*arguments: str, env: dict[str, str] | None = None) -> Settings:
    seen: list[Settings] = []
    result = CliRunner().invoke(
        cli.app(seen.append), list(arguments), env=env, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return seen[0]


def refusal(*arguments: str, env: dict[str, str] | None = None) -> str:
    """What is said when the command line exits with 2."""
    result = CliRunner().invoke(cli.app(lambda _: None), list(arguments), env=env)
    assert result.exit_code == 2
    return result.output


def test_cli_without_options_gives_the_defaults_of_settings():
    assert settings_from("--base", "b") == Settings(base=Path("b"))


def test_help_shows_every_setting_with_its_default():
    shown = CliRunner().invoke(cli.app(lambda _: None), ["--help"], terminal_width=80).output
    for field in fields(Settings):
        flag = cli.FLAGS.get(field.name, field.name)
        assert flag.replace("_", "-") in shown
    text = " ".join(shown.split())
    assert "--delta-budget-bytes SIZE" in text
    assert "[default: 4GiB]" in text
    assert "--device auto|cpu|cuda" in text
    assert "--prefix-cache / --no-prefix-cache" in text
    assert (
        "Folder of delta artifacts; a variant's name is its folder's name. [default: none]" in text
    )


def test_help_groups_the_settings_in_their_order():
    shown = CliRunner().invoke(cli.app(lambda _: None), ["--help"]).output
    headings = [line[:-1] for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [*GROUPS.values(), "Help"]
    names = [field.name for field in fields(Settings)]
    assert [name for name in names if name in GROUPS] == list(GROUPS)
    address = shown[shown.index("\nAddress:") : shown.index("\nDevice and kernels:")]
    assert "--host" in address
    assert "--port" in address
    assert "--base" not in address


def test_version_is_that_of_the_package_and_needs_no_base():
    result = CliRunner().invoke(cli.app(lambda _: None), ["--version"])
    assert (result.exit_code, result.output) == (0, f"impart-serve {__version__}\n")


def test_cli_reads_flags_of_every_kind():
    found = settings_from(
        "--base", "b", "--deltas", "d", "--port", "9000", "--device", "cpu",
        "--delta-budget-bytes", "500MB", "--kv-cache-bytes", "1.5GiB", "--max-body-bytes", "7",
        "--mode-override", "a=reconstruct", "--mode-override", "b=apply",
        "--max-model-len", "128", "--drain-timeout-s", "1.5", "--log-format", "json",
    )  # fmt: skip

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


def test_cli_takes_switches_from_the_environment():
    env = {"IMPART_BASE": "b", "IMPART_PREFIX_CACHE": "0", "IMPART_ENFORCE_EAGER": "true"}
    found = settings_from(env=env)
    assert (found.prefix_cache, found.enforce_eager) == (False, True)


def test_cli_takes_an_empty_variable_for_none():
    assert settings_from("--base", "b", env={"IMPART_PORT": ""}).port == 8000


def test_cli_ignores_variables_that_are_no_setting():
    assert settings_from("--base", "b", env={"IMPART_CHOSEN_THREADS": "2"}).torch_threads is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "base is required"),
        (("--kv-cache-bytes", "lots"), "'lots' is not a size; write 4GiB"),
        (("--kv-cache-bytes", "-1"), "'-1' is not a size"),
        (("--kv-cache-bytes", "0"), "kv_cache_bytes must be above 0"),
        (("--device", "tpu"), "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        (("--mode-override", "a=magic"), "'a=magic' is not VARIANT=MODE"),
        (("--mode-override", "a"), "'a' is not VARIANT=MODE"),
        (("--port", "70000"), "port must be at most 65535, got '70000'"),
        (("--port", "http"), "port must be a whole number, got 'http'"),
        (("--unknown", "1"), "No such option: --unknown"),
    ],
)
def test_cli_wrong_values_exit_with_2_and_say_why(arguments, says):
    with_base = ("--base", "b", *arguments) if arguments else ()
    assert says in refusal(*with_base)


def test_cli_wrong_variable_exits_with_2_and_says_why():
    env = {"IMPART_BASE": "b", "IMPART_MAX_NUM_SEQS": "many"}
    assert "max_num_seqs must be a whole number, got 'many'" in refusal(env=env)
