from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressor.artifact.certificate import (
    Certificate,
    GoldenPrompt,
    dump_certificate,
    parse_certificate,
    read_certificate,
    room_for,
    rounded_log_probs,
)
from compressor.artifact.files import CERTIFICATE
from compressor.artifact.reader import read_artifact, read_digest
from compressor.artifact.writer import ArtifactWriter
from compressor.errors import Corrupt
from tests.compressor.artifacts import CONFIG, deltas

PROMPT = GoldenPrompt((1, 2, 3), (4, 5), (-0.5, 0.0), (-0.6, -0.001), (-9.25, -99.999))
FOUND = Certificate("impart-serve 1", "built-in", "float32", 0.0123, 1.0, 4.5, 0.25, (PROMPT,))


def test_certificate_written_and_read_is_the_same_whatever_it_is_filled_up_with() -> None:
    for n_bytes in (0, 5000):
        raw = dump_certificate(FOUND, n_bytes)
        assert parse_certificate(raw) == FOUND
        assert json.loads(raw)["prompts"][0]["tokens"] == [4, 5]
    assert len(raw) == 5000
    assert parse_certificate(raw).summary()["n_tokens"] == 2


def test_room_for_a_certificate_is_never_less_than_it_takes() -> None:
    unmeasured = replace(PROMPT, delta=())
    room = room_for([unmeasured], FOUND.created_by, FOUND.texts, FOUND.dtype)
    found = replace(FOUND, kl_per_token=1.234e-05, prompts=(replace(PROMPT, delta=(-98.123,) * 2),))
    assert len(dump_certificate(found)) <= len(room)
    assert len(dump_certificate(found, len(room))) == len(room)


def test_rounded_log_probs_are_within_what_can_be_written() -> None:
    assert rounded_log_probs([1e-9, -0.12345, -1e9, -0.0]) == (0.0, -0.123, -99.999, 0.0)


def edit(change: Callable[[dict[str, Any]], object]) -> bytes:
    record = json.loads(dump_certificate(FOUND))
    change(record)
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        edit(lambda r: r.pop("dtype")),
        edit(lambda r: r.update(more=1)),
        edit(lambda r: r.update(format_version=2)),
        edit(lambda r: r.update(texts="x" * 300)),
        edit(lambda r: r.update(kl_per_token=-1)),
        edit(lambda r: r.update(kl_per_token=True)),
        edit(lambda r: r.update(prompts=[])),
        edit(lambda r: r.update(prompts=r["prompts"] * 65)),
        edit(lambda r: r["prompts"][0].update(prompt=[])),
        edit(lambda r: r["prompts"][0].update(prompt=[1] * 513)),
        edit(lambda r: r["prompts"][0].update(tokens=[-1, 2])),
        edit(lambda r: r["prompts"][0].update(tokens=[1.5, 2])),
        edit(lambda r: r["prompts"][0].update(base=[-1])),
        edit(lambda r: r["prompts"][0].update(delta=[0.5, -1])),
        edit(lambda r: r["prompts"][0].update(delta=["a", -1])),
        edit(lambda r: r["prompts"].append(3)),
    ],
)
def test_parse_certificate_of_another_form_raises_corrupt_naming_the_file(raw: bytes) -> None:
    with pytest.raises(Corrupt, match=r"^certificate\.json"):
        parse_certificate(raw)


def test_certificate_in_an_artifact_is_verified_and_changes_the_digest(tmp_path: Path) -> None:
    for name, aux in (("plain", {}), ("certified", {CERTIFICATE: dump_certificate(FOUND)})):
        with ArtifactWriter(tmp_path / name, run_key="k") as writer:
            for delta in deltas():
                writer.add(delta)
            writer.finish(CONFIG, aux)
    assert read_certificate(tmp_path / "plain") == (None, read_digest(tmp_path / "plain"))
    certificate, digest = read_certificate(tmp_path / "certified")
    assert certificate == read_artifact(tmp_path / "certified").certificate == FOUND
    assert digest == read_digest(tmp_path / "certified") != read_digest(tmp_path / "plain")
    (tmp_path / "certified" / CERTIFICATE).write_bytes(dump_certificate(FOUND, 4000))
    for read in (read_certificate, read_artifact):
        with pytest.raises(Corrupt, match="differs from its checksum"):
            read(tmp_path / "certified")
