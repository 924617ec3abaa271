"""The header against the library's own files, and against hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import deserialize
from safetensors.torch import save

from compressor.checkpoint.files import TensorFiles
from compressor.errors import CheckpointError
from compressor.safetensors_header import (
    LENGTH_BYTES,
    BadHeader,
    Header,
    HeaderEntry,
    framed,
    header_json,
    parse_header,
    parse_length,
)

GOOD = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def text(**changes: object) -> bytes:
    return json.dumps({"a": GOOD | changes}).encode()


def test_header_of_a_file_by_the_library_is_read() -> None:
    raw = save({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}, {"k": "v"})
    length = parse_length(raw)
    header = parse_header(raw[LENGTH_BYTES : LENGTH_BYTES + length])
    assert header.metadata == {"k": "v"}
    shapes = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    assert shapes == {"a": ("F32", (2, 3)), "b": ("I64", ())}
    assert sorted((e.start, e.end) for e in header.tensors.values())[-1][1] == 32


def test_header_written_here_is_read_by_the_library_and_back() -> None:
    entries = [("ä", "F32", (2, 1), 8), ("b", "U8", (3,), 3)]
    written = framed(header_json(entries, {"format": "pt"}))
    assert len(written) % 8 == 0
    data = bytes(range(11))
    assert [(name, bytes(t["data"])) for name, t in sorted(deserialize(written + data))] == [
        ("b", data[8:]),
        ("ä", data[:8]),
    ]
    assert parse_header(written[LENGTH_BYTES:]) == Header(
        {"format": "pt"},
        {"ä": HeaderEntry("F32", (2, 1), 0, 8), "b": HeaderEntry("U8", (3,), 8, 11)},
    )


@pytest.mark.parametrize(
    "hostile",
    [
        b"", b"{{", b"[]", b"1", b"null", b"\x00\x00", b"\xef\xbb\xbf{}", b'{"\xff":1}',
        '{"a":1}'.encode("utf-16"),
        text() + b"x",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":%s,"a":%s}' % (json.dumps(GOOD).encode(), json.dumps(GOOD).encode()),
        text().replace(b'"shape"', b'"shape":[4],"shape"'),
        text().replace(b'"a"', b'"\\ud800"'),
        *(text(shape=shape) for shape in ([-4], [4.0], ["4"], [True, 4], 4, None, [1 << 62])),
        text(shape=[1] * 9),
        *(text(data_offsets=offsets) for offsets in ([4, 0], [-4, 0], [0], [0, 2, 4], [0, 1e1])),
        text(dtype=None),
        text(other=1),
        b'{"a":{"dtype":"U8","shape":[4]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}',
        *(b'{"__metadata__":%s}' % value for value in (b"[]", b"null", b'{"a":1}', b'"x"')),
    ],
)  # fmt: skip
def test_hostile_header_is_refused(hostile: bytes) -> None:
    with pytest.raises(BadHeader):
        parse_header(hostile)


def test_bad_header_of_a_long_name_stays_short() -> None:
    with pytest.raises(BadHeader) as refused:
        parse_header(json.dumps({"a" * 1_000_000: {}}).encode())
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("start", [b"", b"1234567"])
def test_file_shorter_than_a_length_is_refused(start: bytes) -> None:
    with pytest.raises(BadHeader):
        parse_length(start)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"1234567", (1 << 63).to_bytes(8, "little") + b"{}", framed(b"{{"),
        framed(text(data_offsets=[0, 1 << 61])),
        framed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + b"1234",
    ],
)  # fmt: skip
def test_checkpoint_with_a_hostile_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        TensorFiles("m", [tmp_path / "m.safetensors"])
