"""Entropy coded artifacts: the same tensors, and frames that lie are refused before they cost."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors import safe_open

from compressor.artifact import entropy
from compressor.artifact.coded_file import FRAME_BYTES, MAX_EXPANSION, decode_frames
from compressor.artifact.entropy import Tally, code_frame, coded_frames
from compressor.artifact.reader import read_artifact, read_config
from compressor.artifact.tensor_file import METADATA, header_text, parse_tensor_file
from compressor.artifact.writer import ArtifactWriter
from compressor.codecs import DenseRows, TensorDelta
from compressor.errors import ArtifactError, Corrupt, InputError, TooLarge, UnsupportedVersion
from tests.compressor.artifact.mutations import read_frames, write_frames
from tests.compressor.artifacts import (
    AUX,
    CONFIG,
    deltas,
    edit_config,
    limited_memory,
    same_delta,
    seal,
    write_artifact,
)

Frames = dict[str, bytes]


def zstd(raw: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(raw)


def damage(path: Path, change: Callable[[Frames], object]) -> None:
    file = path / "delta.safetensors"
    frames = read_frames(file.read_bytes())
    change(frames)
    file.write_bytes(write_frames(frames))
    seal(path)


# --- the right thing ----------------------------------------------------------------------------


def test_read_artifact_of_a_coded_one_returns_what_was_written(pristine_coded: Path) -> None:
    artifact = read_artifact(pristine_coded)
    for got, want in zip(artifact.tensors, sorted(deltas(), key=lambda d: d.name), strict=True):
        same_delta(got, want)
    assert artifact.aux == AUX
    assert json.loads((pristine_coded / "delta_config.json").read_bytes())["format_version"] == 3
    assert read_config(pristine_coded) == artifact.config


def test_without_the_coder_only_coded_artifacts_are_refused(
    pristine: Path, pristine_coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert read_artifact(pristine).tensors
    with pytest.raises(InputError, match="pip install zstandard"):
        read_artifact(pristine_coded)
    with pytest.raises(InputError, match="pip install zstandard"):
        code_frame(b"")


def test_coded_tensor_file_is_safetensors_of_frames_that_zstd_alone_decodes(
    pristine: Path, pristine_coded: Path
) -> None:
    with safe_open(pristine_coded / "delta.safetensors", "pt") as stored:
        assert stored.metadata()["impart_format_version"] == "3"
        raw = {
            key: zstandard.decompress(bytes(stored.get_tensor(key).numpy()))
            for key in stored.keys()  # noqa: SIM118
        }
    index = json.loads(raw.pop("index"))
    assert index.pop("__metadata__")["impart_format_version"] == "3"
    data = b"".join(raw[str(number)] for number in range(len(raw)))
    with safe_open(pristine / "delta.safetensors", "pt") as plain:
        assert set(index) == set(plain.keys())
        for key, entry in index.items():
            expected = plain.get_tensor(key)
            part = data[slice(*entry["data_offsets"])]
            assert torch.equal(
                torch.frombuffer(bytearray(part), dtype=expected.dtype), expected.reshape(-1)
            )


def test_coding_counts_all_bytes_by_group_and_is_deterministic(tmp_path: Path) -> None:
    digests = [write_artifact(tmp_path / name, coded=True) for name in ("one", "two")]
    assert digests[0] == digests[1]
    artifact = read_artifact(tmp_path / "one")
    coding = artifact.config.coding
    assert coding is not None
    stored = [part for delta in artifact.tensors for term in delta.terms
              for part in term.tensors().values()]  # fmt: skip
    stored += [delta.exact.values for delta in artifact.tensors if delta.exact is not None]
    assert sum(coding.raw_bytes.values()) == sum(part.nbytes for part in stored)
    frames = read_frames((tmp_path / "one" / "delta.safetensors").read_bytes())
    sizes = sum(len(frame) for name, frame in frames.items() if name != "index")
    assert sum(artifact.config.bytes.values()) == sizes


def test_frames_are_cut_at_their_limit_and_one_run_does_not_share_them_with_another() -> None:
    parts = [os.urandom(FRAME_BYTES - 1), b"ab", os.urandom(3)]
    tally = Tally()
    frames = list(coded_frames([("x", parts), ("y", [memoryview(b"z" * 100)])], tally))
    raw = [zstandard.decompress(frame) for frame in frames]
    assert [len(part) for part in raw] == [FRAME_BYTES, 4, 100]
    assert b"".join(raw) == b"".join(parts) + b"z" * 100
    assert tally.raw == {"x": FRAME_BYTES + 4, "y": 100}
    assert tally.coded == {"x": sum(map(len, frames[:2])), "y": len(frames[2])}


def test_many_frames_decode_on_threads_to_the_same_bytes() -> None:
    words = torch.arange(3 << 19).remainder(50021).float()  # 6 MiB, twice
    tensors = {"0.exact": words, "1.exact": -words}
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    frames = {"index": zstd(header_text(tensors, METADATA))}
    for number, start in enumerate(range(0, len(data), FRAME_BYTES)):
        frames[str(number)] = zstd(data[start : start + FRAME_BYTES])
    assert len(frames) > 12
    file = decode_frames(parse_tensor_file(write_frames(frames)), n_threads=4)
    assert all(torch.equal(file.tensor(key), tensor) for key, tensor in tensors.items())


def test_what_expands_beyond_the_limit_is_known_before_it_is_published(tmp_path: Path) -> None:
    zeros = torch.zeros(1 << 18)
    with ArtifactWriter(tmp_path / "d", run_key="k") as writer:
        writer.add(TensorDelta("a", (1 << 18,), (1 << 18,), False, (), DenseRows(0, zeros)))
        written = writer.write_tensors(coded=True)
        writer.finish(CONFIG)
    assert not written.is_coded
    assert len(code_frame(zeros.numpy().tobytes())) * MAX_EXPANSION < zeros.nbytes
    assert read_artifact(tmp_path / "d").n_bytes > zeros.nbytes


# --- lies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format_version": 1}, UnsupportedVersion),
        ({"format_version": 2}, UnsupportedVersion),
        ({"coding": None}, Corrupt),
        ({"coding": {"coder": "zstd"}}, Corrupt),
        ({"coding": {"coder": "zstd", "raw_bytes": {"x": -1}}}, Corrupt),
        ({"coding": {"coder": "brotli", "raw_bytes": {}}}, UnsupportedVersion),
    ],
)
def test_configuration_that_contradicts_the_coded_file_raises(
    coded: Path, change: dict[str, object], error: type[ArtifactError]
) -> None:
    edit_config(coded, lambda record: record.update(change))
    with pytest.raises(error):
        read_artifact(coded)


def test_configuration_that_calls_a_plain_file_coded_raises(artifact: Path) -> None:
    coding = {"coder": "zstd", "raw_bytes": {}}
    edit_config(artifact, lambda record: record.update(coding=coding))
    with pytest.raises(Corrupt, match="expected index"):
        read_artifact(artifact)


def test_configuration_that_calls_a_coded_file_plain_raises(coded: Path) -> None:
    edit_config(coded, lambda record: record.pop("coding"))
    with pytest.raises(Corrupt, match="explains the tensor"):
        read_artifact(coded)


def _resized(frame: bytes, change: int) -> bytes:
    """The frame with another declared size; it has a byte of it, or two and an offset of 256."""
    changed = bytearray(frame)
    size = zstandard.frame_content_size(frame)
    at = 5 if frame[4] & 0x20 else 6
    wide = frame[4] >> 6
    assert wide in (0, 1)
    changed[at : at + 1 + wide] = (size + change - 256 * wide).to_bytes(1 + wide, "little")
    assert zstandard.frame_content_size(bytes(changed)) == size + change
    return bytes(changed)


FRAME_LIES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda frame: frame[:-1],
    "cut inside its header": lambda frame: frame[:4],
    "trailing byte": lambda frame: frame + b"\0",
    "second frame": lambda frame: frame + zstd(b"x"),
    "empty frame behind": lambda frame: frame + zstd(b""),
    "skippable frame": lambda frame: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame,
    "not zstd": lambda frame: b"(" * len(frame),
    "nothing in it": lambda frame: zstd(b""),
    "undeclared size": lambda frame: zstd(zstandard.decompress(frame), write_content_size=False),
    "declares more": lambda frame: _resized(frame, 1),
    "declares less": lambda frame: _resized(frame, -1),
    "holds more": lambda frame: zstd(zstandard.decompress(frame) + b"x"),
    "holds less": lambda frame: zstd(zstandard.decompress(frame)[:-1]),
}


@pytest.mark.parametrize("kind", FRAME_LIES)
@pytest.mark.parametrize("name", ["index", "0", "4"])
def test_frame_that_lies_raises_corrupt(coded: Path, name: str, kind: str) -> None:
    damage(coded, lambda frames: frames.update({name: FRAME_LIES[kind](frames[name])}))
    with pytest.raises(Corrupt):
        read_artifact(coded)


@pytest.mark.parametrize(
    "change",
    [
        lambda frames: frames.pop("0"),
        lambda frames: frames.pop("index"),
        lambda frames: frames.update({"x": frames["0"]}),
        lambda frames: frames.update({"007": frames.pop("0")}),
        lambda frames: frames.update({"-1": frames["0"]}),
        lambda frames: frames.clear(),
    ],
)
def test_missing_renamed_and_surplus_frames_raise_corrupt(
    coded: Path, change: Callable[[Frames], object]
) -> None:
    damage(coded, change)
    with pytest.raises(Corrupt):
        read_artifact(coded)


def test_index_of_another_version_raises_unsupported_version(coded: Path) -> None:
    def nest(frames: Frames) -> None:
        text = zstandard.decompress(frames["index"])
        version = b'"impart_format_version":"'
        assert version + b"3" in text
        frames["index"] = code_frame(text.replace(version + b"3", version + b"1"))

    damage(coded, nest)
    with pytest.raises(UnsupportedVersion):
        read_artifact(coded)


def test_frame_that_is_no_row_of_bytes_raises_corrupt(coded: Path) -> None:
    file = coded / "delta.safetensors"
    raw = file.read_bytes()
    (frame,) = [frame for name, frame in read_frames(raw).items() if name == "index"]
    shape = f'"index":{{"dtype":"U8","shape":[{len(frame)}]'.encode()
    assert shape in raw
    file.write_bytes(raw.replace(shape, shape.replace(b"[", b"[1,")).replace(b"  ", b"", 1))
    seal(coded)
    with pytest.raises(Corrupt):
        read_artifact(coded)


def test_bombs_raise_too_large_before_they_expand(coded: Path) -> None:
    zeros = zstd(bytes(FRAME_BYTES))
    assert len(zeros) * 1000 < FRAME_BYTES
    damage(coded, lambda frames: frames.update({str(i): zeros for i in range(len(frames) - 1)}))
    with pytest.raises(TooLarge, match="times its size"):
        read_artifact(coded)


@pytest.mark.parametrize(("name", "size"), [("0", FRAME_BYTES + 1), ("index", (8 << 20) + 1)])
def test_frame_beyond_the_limit_for_its_kind_raises_too_large(
    coded: Path, name: str, size: int
) -> None:
    damage(coded, lambda frames: frames.update({name: zstd(bytes(size))}))
    with pytest.raises(TooLarge, match="the limit is"):
        read_artifact(coded)


def test_frame_that_asks_for_a_window_of_gigabytes_costs_nothing(coded: Path) -> None:
    """Decoded in one go it needs no window, whatever it says."""

    def widen(frames: Frames) -> None:
        raw = zstandard.decompress(frames["0"])
        window, size = bytes([0xA8]), len(raw).to_bytes(4, "little")  # 2^31 bytes
        block = (len(raw) << 3 | 1).to_bytes(3, "little") + raw
        frames["0"] = b"\x28\xb5\x2f\xfd\x80" + window + size + block
        assert zstandard.get_frame_parameters(frames["0"]).window_size == 1 << 31

    damage(coded, widen)
    with limited_memory(64 << 20):
        artifact = read_artifact(coded)
    assert len(artifact.tensors) == len(deltas())


def test_coder_has_no_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, n_threads: int, **options: str) -> None:
            made.append(n_threads)
            super().__init__(n_threads, **options)

    monkeypatch.setattr(entropy, "ThreadPoolExecutor", Pool)
    monkeypatch.setenv("PYTHON_CPU_COUNT", "1")
    assert list(coded_frames([("x", [b"abc"])], Tally())) == [code_frame(b"abc")]
    assert made == [1]
