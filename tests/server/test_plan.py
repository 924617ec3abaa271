"""``impart plan``: in numbers, by headers alone, on the safe side of what a load takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compressor.artifact.reader import TermEntry, read_config
from compressor.errors import Corrupt
from server.deltas.footprint import expected_bytes
from server.plan import kv_bytes_per_token, plan_offline
from tests.server.conftest import ALL_CODECS, Served
from tests.server.helpers import CoreHarness


def plan(*arguments: object) -> tuple[int, str]:
    import typer

    app = typer.Typer()
    app.command()(plan_offline)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def everything(served: Callable[..., Served]) -> Served:
    return served("llama", ALL_CODECS)


def test_expected_bytes_of_every_codec_are_no_less_than_a_load_takes(
    everything: Served, harness: Callable[..., CoreHarness]
) -> None:
    engine = harness(everything, max_resident_variants=len(ALL_CODECS))
    for name in ALL_CODECS:
        engine.run(engine.submit(name, "The quick brown fox", max_tokens=1))
        key = engine.catalog.open(name).key
        slot = engine.core.slots.get(key)
        assert slot is not None
        expected = expected_bytes(read_config(everything.deltas / name), 4)
        assert slot.n_bytes <= expected <= 2 * slot.n_bytes, (name, slot.n_bytes, expected)


def test_kv_bytes_per_token_are_those_that_the_engine_reserves(
    everything: Served, harness: Callable[..., CoreHarness]
) -> None:
    from compressor.checkpoint.folder import read_model_config

    engine = harness(everything)
    reserved = engine.core._runner.base.store.bytes_per_token()
    assert kv_bytes_per_token(read_model_config(everything.base), 4) == reserved


def test_plan_says_what_is_left_or_refuses_with_the_numbers(everything: Served) -> None:
    arguments = [everything.base, everything.deltas / "impart", "--memory"]
    code, shown = plan(*arguments, "1GiB")
    assert code == 0, shown
    assert "left for KV" in shown
    code, shown = plan(*arguments, "400KB")
    assert code == 1
    assert "does not fit" in shown
    assert "--max-model-len" in shown
    assert plan(*arguments, "much")[0] == 2


def test_plan_of_another_bases_delta_is_refused(everything: Served, tmp_path: Path) -> None:
    other = everything.checkpoints["impart"]
    code, shown = plan(other, everything.deltas / "impart", "--memory", "1GiB")
    assert (code, "WrongBase" in shown or "made for base" in shown) == (2, True)


def test_expected_bytes_of_a_strangers_parameters_raise_corrupt(everything: Served) -> None:
    config = read_config(everything.deltas / "impart")
    for params in ({}, {"kept": "x", "block_rows": 1}, {"kept": 1, "block_rows": 0}):
        terms = (TermEntry("impart", params),)
        wrong = replace(config, tensors=(replace(config.tensors[0], terms=terms),))
        with pytest.raises(Corrupt):
            expected_bytes(wrong, 4)
