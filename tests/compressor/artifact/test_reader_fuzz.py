"""Fuzzing the reader: only errors of ours come out, and no memory beyond the files' size class.

`fuzz.py` does the same guided by coverage, where atheris is installed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from compressor.artifact.reader import Artifact, read_artifact, read_config, read_digest
from compressor.artifact.writer import ArtifactWriter
from compressor.cli.app import app
from compressor.codecs import TensorDelta
from compressor.encoders.codec import make_encoder
from compressor.errors import ArtifactError, Corrupt, WrongShape
from compressor.printable import printable
from tests.compressor.artifact.mutations import (
    CODED_MUTATIONS,
    MUTATIONS,
    Files,
    read_files,
    sealed,
    write_files,
)
from tests.compressor.artifacts import CONFIG, edit_config, edit_entry, limited_memory, seal
from tests.compressor.codec_oracles import encode, random_matrix

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
ROOM_BYTES = 64 << 20  # the artifact has 6 kB; a declared size that is believed asks for far more
DENSE_ELEMENTS = 1 << 20

by_mutation = pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
# What a terminal would obey, what rich would take for markup, what is no character at all.
HOSTILE = ("\x1b[2J\x1b[31m", "[/bold][red]", "a\nb\r", "\u202egpj.exe", "[link=x]y")
quick = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check_readers(path: Path) -> None:
    """Read every way there is; ArtifactError is the only way out. What is readable is usable."""
    artifact: Artifact | None = None
    with limited_memory(ROOM_BYTES):
        for read in (read_digest, read_config, read_artifact):
            try:
                artifact = read(path)  # type: ignore[assignment]
            except ArtifactError as error:
                artifact = None
                str(error).encode()  # printable anywhere: no half characters of a name in it
    if artifact is not None:
        assert artifact.digest == read_digest(path)
        for delta in artifact.tensors:
            check_usable(delta)


def check_usable(delta: TensorDelta) -> None:
    for term in delta.terms:
        m, n = term.shape
        assert (m, n) == delta.base_shape
        if m * n <= DENSE_ELEMENTS:
            dense = term.to_dense()
            assert dense.shape == (m, n)
            assert torch.isfinite(dense).all()
            row = torch.tensor([m - 1])
            torch.testing.assert_close(term.dense_rows(row), dense[-1:], rtol=1e-4, atol=1e-6)
    if delta.exact is not None:
        assert torch.isfinite(delta.exact.values).all()


def check_commands(path: Path) -> None:
    """Inspect and verify exit with 0, or with 2 and one line; nothing reaches the terminal raw."""
    for arguments in (("inspect", "--tensors"), ("inspect", "--json"), ("verify",)):
        result = CliRunner().invoke(app, [*arguments, str(path)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in (0, 2)
        assert (result.exit_code == 2) == (result.stderr.count("\n") == 1)
        shown = result.stdout + result.stderr
        assert all(char == "\n" or char.isprintable() for char in shown), repr(shown)


def run(files: Files, mutate: Callable[[Files, Random], Files], random: Random, path: Path) -> None:
    write_files(path, mutate(files, random))
    check_readers(path)


@by_mutation
@quick
@given(random=st.randoms(use_true_random=False))
def test_mutated_artifact_reads_or_raises_artifact_error(
    pristine: Path, tmp_path: Path, mutate: Callable[[Files, Random], Files], random: Random
) -> None:
    run(read_files(pristine), mutate, random, tmp_path / "d")


@settings(quick, max_examples=150)
@given(
    mutate=st.sampled_from(CODED_MUTATIONS),
    random=st.randoms(use_true_random=False),
)
def test_mutated_coded_artifact_reads_or_raises_artifact_error(
    pristine_coded: Path,
    tmp_path: Path,
    mutate: Callable[[Files, Random], Files],
    random: Random,
) -> None:
    run(read_files(pristine_coded), mutate, random, tmp_path / "d")


@settings(quick, max_examples=40)
@given(
    mutate=st.sampled_from(MUTATIONS[1:]),
    random=st.randoms(use_true_random=False),
)
def test_commands_on_a_mutated_artifact_print_or_exit_2(
    pristine: Path, tmp_path: Path, mutate: Callable[[Files, Random], Files], random: Random
) -> None:
    write_files(tmp_path / "d", mutate(read_files(pristine), random))
    check_commands(tmp_path / "d")


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_an_artifact_reach_the_terminal_as_plain_text(artifact: Path, text: str) -> None:
    def change(record: dict[str, Any]) -> None:
        record |= {"created_by": text, "codec": text, "options": {text: text}}
        record["base"]["name_or_path"] = record["finetuned"]["name_or_path"] = text
        record["bytes"] = {text: 100}

    edit_config(artifact, change)
    check_commands(artifact)
    shown = CliRunner().invoke(app, ["inspect", str(artifact)]).stdout
    assert shown.count(printable(text)) >= 4


@pytest.mark.parametrize("name", [*HOSTILE[:1], *HOSTILE[2:4], "", "a" * 513, "\ud800"])
def test_tensor_name_that_is_no_name_raises_corrupt(artifact: Path, name: str) -> None:
    edit_entry(artifact, "z.block", lambda entry: entry.update(name=name))
    with pytest.raises(Corrupt) as caught:
        read_artifact(artifact)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("finetuned_bytes", 10**400), ("finetuned_bytes", -1), ("seed", 1 << 63),
        ("bytes", {"x": -1}), ("bytes", {"x": 10**20}), ("options", {"a": "\ud800"}),
        ("options", json.loads('{"a":' * 20 + "1" + "}" * 20)),
        ("fidelity", {"kl_per_token": "x"}), ("fidelity", {"n_tokens": 1.5}),
        ("finetuned", {"name_or_path": "x", "dtype": 3}),
        ("finetuned", {"name_or_path": "x", "dropped_files": 3}),
        ("finetuned", {"name_or_path": "x", "dropped_files": [3]}),
        ("finetuned", {"name_or_path": "x", "config": []}),
        ("finetuned", {"name_or_path": "x", "config": {"auto_map": {"AutoModel": "evil.M"}}}),
        ("finetuned", {"name_or_path": "x", "config": {"quantization_config": {}}}),
    ],
)  # fmt: skip
def test_value_that_no_program_should_meet_raises_corrupt(
    artifact: Path, key: str, value: object
) -> None:
    edit_config(artifact, lambda record: record.update({key: value}))
    with pytest.raises(Corrupt):
        read_config(artifact)


def test_empty_tensor_of_unbounded_shape_raises_wrong_shape(artifact: Path) -> None:
    file = artifact / "delta.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["x"] = {"dtype": "U8", "shape": [0, 1 << 61, 1 << 61], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    seal(artifact)
    with pytest.raises(WrongShape):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["delta_config.json", "delta.safetensors"])
def test_json_in_another_encoding_raises_corrupt(artifact: Path, name: str) -> None:
    file = artifact / name
    if name == "delta_config.json":
        file.write_bytes(file.read_bytes().decode().encode("utf-16"))
    else:
        text = '{"__metadata__": {}}'.encode("utf-16-le")
        file.write_bytes(struct.pack("<Q", len(text)) + text)
    seal(artifact)
    with pytest.raises(Corrupt):
        read_artifact(artifact)


@pytest.mark.slow
@by_mutation
def test_many_mutated_artifacts(
    pristine: Path, tmp_path: Path, mutate: Callable[[Files, Random], Files]
) -> None:
    files = read_files(pristine)
    for seed in range(20_000):
        run(files, mutate, Random(seed), tmp_path / "d")
        if seed % 10 == 0:
            check_commands(tmp_path / "d")


# --- memory -------------------------------------------------------------------------------------


def status_bytes(key: str) -> int:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) << 10


def peak_bytes(action: Callable[[], object]) -> int:
    """Resident memory that `action` needed at most, beyond what was resident before."""
    CLEAR_REFS.write_text("5")  # forget the highest so far
    before = status_bytes("VmRSS")
    kept = action()
    assert kept is not None
    return status_bytes("VmHWM") - before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """An artifact of one large matrix, whose payload is some megabytes."""

    def make(codec: str, bits: int) -> Path:
        path = tmp_path_factory.mktemp("large") / "delta"
        shape = (8192, 256)
        options = {} if codec == "impart" else {"bits": bits}
        encoder = make_encoder(codec, **options)
        terms = encode(encoder, random_matrix(shape), encoder.fit(shape, 1 << 20))
        with ArtifactWriter(path, run_key="key") as writer:
            writer.add(TensorDelta("a", shape, shape, False, terms, None))
            writer.finish(CONFIG)
        return path

    return make


# Parts are kept as they are on disk, beside the buffer that is read; nothing is unpacked.
@pytest.mark.parametrize(
    ("codec", "bits", "multiple"),
    [("blockdiag", 2, 6), ("lowrank", 4, 6), ("blockdiag", 16, 6), ("impart", 0, 6)],
)
def test_peak_memory_is_a_small_multiple_of_the_files(
    large: Callable[[str, int], Path], codec: str, bits: int, multiple: int
) -> None:
    path = large(codec, bits)
    n_bytes = sum(file.stat().st_size for file in path.iterdir())
    assert n_bytes > 1 << 19
    read_artifact(path)
    assert peak_bytes(lambda: read_artifact(path)) < multiple * n_bytes + (4 << 20)


def test_declared_sizes_cost_nothing_before_they_are_checked(
    pristine: Path, tmp_path: Path
) -> None:
    """Shapes, ranks and counts that would take terabytes, in every number of the configuration."""
    files = read_files(pristine)
    raw = files["delta_config.json"].decode()
    starts = [i for i, c in enumerate(raw) if c.isdigit() and not raw[i - 1].isalnum()]
    assert len(starts) > 50
    for start in starts:
        if raw[start - 1] not in ":,[":
            continue
        end = start
        while raw[end].isdigit():
            end += 1
        for number in ("2147483647", "1099511627776"):
            changed = (raw[:start] + number + raw[end:]).encode()
            write_files(tmp_path / "d", sealed(files | {"delta_config.json": changed}))
            check_readers(tmp_path / "d")
