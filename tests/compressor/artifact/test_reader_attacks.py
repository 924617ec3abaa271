"""Sealed lies: the checksums are right, the content is not. Each has its own error."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.artifact.reader import read_artifact, read_config
from compressor.errors import (
    ArtifactError,
    Corrupt,
    NonFinite,
    NotADelta,
    TooLarge,
    UnsupportedVersion,
    WrongBase,
    WrongShape,
)
from tests.compressor.artifacts import (
    edit_config,
    edit_entry,
    edit_tensors,
    key_of,
    seal,
)


def test_other_base_raises_wrong_base_before_the_tensors_are_read(artifact: Path) -> None:
    (artifact / "delta.safetensors").unlink()
    with pytest.raises(WrongBase, match="org/base"):
        read_artifact(artifact, base_identity="cd" * 32)


@pytest.mark.parametrize("version", [0, 4, "3", None, True, 10**30])
def test_unknown_format_version_raises_unsupported_version(artifact: Path, version) -> None:
    edit_config(artifact, lambda record: record.update(format_version=version))
    for read in (read_artifact, read_config):
        with pytest.raises(UnsupportedVersion):
            read(artifact)


@pytest.mark.parametrize("version", [b"1", b"2", b"4"])
def test_other_version_in_the_tensor_file_raises_unsupported_version(
    artifact: Path, version: bytes
) -> None:
    file = artifact / "delta.safetensors"
    raw, key = file.read_bytes(), b'"impart_format_version":"'
    assert key + b"3" in raw
    file.write_bytes(raw.replace(key + b"3", key + version))
    seal(artifact)
    with pytest.raises(UnsupportedVersion):
        read_artifact(artifact)


def test_unknown_codec_raises_unsupported_version_naming_the_tensor(artifact: Path) -> None:
    edit_entry(artifact, "z.block", lambda entry: entry["terms"][0].update(codec="zip"))
    with pytest.raises(UnsupportedVersion, match=r"z\.block"):
        read_artifact(artifact)


def test_foreign_format_raises_not_a_delta(artifact: Path) -> None:
    edit_config(artifact, lambda record: record.update(format="peft"))
    with pytest.raises(NotADelta):
        read_artifact(artifact)


def _set(tensors: dict[str, torch.Tensor], key: str, value: Any, at: int = 0) -> None:
    tensors[key].view(-1)[at] = value


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("z.block", "0.scales"),
        ("b.half", "0.values"),
        ("a.impart", "0.u_values"),
        ("c.low", "0.a_scales"),
        ("embed.weight", "exact"),
        ("norm.weight", "exact"),
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_value_raises_naming_the_tensor(artifact: Path, name, part, bad) -> None:
    key = key_of(artifact, name, part)
    edit_tensors(artifact, lambda tensors: _set(tensors, key, bad, 1))
    with pytest.raises(NonFinite, match=name):
        read_artifact(artifact)


def test_set_padding_bit_raises_corrupt(artifact: Path) -> None:
    key = key_of(artifact, "z.block", "0.codes")
    edit_tensors(artifact, lambda tensors: _set(tensors, key, 255, -1))
    with pytest.raises(Corrupt, match="padding"):
        read_artifact(artifact)


@pytest.mark.parametrize(
    ("name", "part", "shape"),
    [
        ("y.columns", "0.codes", [2, 6, 2]),  # instead of [2, 2, 6]
        ("y.columns", "0.codes", [4, 6]),
        ("y.columns", "0.codes", [1, 2, 2, 6]),
        ("y.low", "0.a", [1, 16]),  # instead of [4, 4]
        ("y.low", "0.b", [6, 1]),  # instead of [1, 6]
        ("z.block", "0.codes", [1, 19]),  # codes of three bits, and blocks that differ
        ("c.low", "0.a", [1, 11]),  # 7 codes of 4 bits do not fill their bytes
        ("e.rows", "0.codes", [1, 11]),
    ],
)
def test_codes_in_an_order_that_is_none_raise_wrong_shape_naming_the_tensor(
    artifact: Path, name: str, part: str, shape: list[int]
) -> None:
    key = key_of(artifact, name, part)
    edit_tensors(artifact, lambda tensors: tensors.update({key: tensors[key].reshape(shape)}))
    with pytest.raises(WrongShape, match=name):
        read_artifact(artifact)


def test_index_out_of_range_raises_wrong_shape(artifact: Path) -> None:
    key = key_of(artifact, "a.impart", "0.v_index")
    edit_tensors(artifact, lambda tensors: _set(tensors, key, 30000))
    with pytest.raises(WrongShape):
        read_artifact(artifact)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("z.block", {"shape": [11, 10]}, WrongShape),
        ("z.block", {"shape": [10, 9]}, WrongShape),
        ("z.block", {"shape": [11]}, WrongShape),
        ("z.block", {"shape": []}, WrongShape),
        ("z.block", {"shape": [0, 9]}, WrongShape),
        ("z.block", {"shape": [11, -9]}, WrongShape),
        ("z.block", {"shape": [11, 1 << 60]}, WrongShape),
        ("z.block", {"shape": [1 << 39, 1 << 39]}, WrongShape),
        ("z.block", {"shape": [11, 9.0]}, Corrupt),
        ("z.block", {"shape": "11"}, Corrupt),
        ("z.block", {"shape": [12, 9], "base_shape": [11, 9]}, WrongShape),
        ("z.block", {"base_shape": [12, 9]}, WrongShape),
        ("z.block", {"exact": {"row_start": 0}}, Corrupt),
        ("z.block", {"terms": []}, Corrupt),
        ("z.block", {"terms": None}, Corrupt),
        ("z.block", {"terms": [1]}, Corrupt),
        ("z.block", {"transposed": 1}, Corrupt),
        ("z.block", {"name": None}, Corrupt),
        ("z.block", {"name": "norm.weight"}, Corrupt),
        ("z.block", {"error": "x"}, Corrupt),
        ("z.block", {"error": 10**400}, Corrupt),
        ("norm.weight", {"exact": None}, Corrupt),
        ("norm.weight", {"exact": 3}, Corrupt),
        ("norm.weight", {"exact": {"row_start": 1}}, WrongShape),
        ("norm.weight", {"exact": {"row_start": -1}}, WrongShape),
        ("norm.weight", {"exact": {"row_start": 8}}, WrongShape),
        ("norm.weight", {"shape": [8, 1]}, WrongShape),
        ("embed.weight", {"shape": [15, 8]}, WrongShape),
        ("embed.weight", {"exact": {"row_start": 11}}, WrongShape),
        ("embed.weight", {"exact": {"row_start": 13}}, WrongShape),
    ],
)
def test_entry_that_contradicts_the_tensors_raises(artifact: Path, name, change, error) -> None:
    edit_entry(artifact, name, lambda entry: entry.update(change))
    with pytest.raises(error):
        read_artifact(artifact)


def test_missing_renamed_and_surplus_tensors_raise_corrupt(artifact: Path, tmp_path: Path) -> None:
    key = key_of(artifact, "z.block", "0.scales")

    def remove(tensors):
        del tensors[key]

    def surplus(name):
        return lambda tensors: tensors.update({name: torch.zeros(3)})

    index = key.partition(".")[0]
    changes = [remove] + [
        surplus(name)
        for name in (
            "99.0.codes",
            f"{index}.1.codes",
            f"{index}.0.more",
            f"0{index}.0.codes",
            "x",
            f"{index}.exact",
            f"{index}.",
            f"-{index}.0.a",
            f"{index}.00.codes",
        )
    ]
    for number, change in enumerate(changes):
        copy = Path(shutil.copytree(artifact, tmp_path / str(number)))
        edit_tensors(copy, change)
        with pytest.raises(Corrupt):
            read_artifact(copy)


def test_wrong_dtype_raises(artifact: Path, tmp_path: Path) -> None:
    scales = key_of(artifact, "z.block", "0.scales")
    exact = key_of(artifact, "norm.weight", "exact")
    for number, (key, dtype, error) in enumerate(
        [
            (scales, torch.float32, WrongShape),
            (exact, torch.uint8, WrongShape),
            (scales, torch.int64, UnsupportedVersion),
            (scales, torch.bool, UnsupportedVersion),
        ]
    ):
        copy = Path(shutil.copytree(artifact, tmp_path / str(number)))
        edit_tensors(copy, lambda t, k=key, d=dtype: t.update({k: t[k].to(d)}))
        with pytest.raises(error):
            read_artifact(copy)


def _header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _with_header(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _lie(header: dict[str, Any], data: bytes, kind: str) -> tuple[bytes, type[ArtifactError]]:
    keys = [key for key in header if key != "__metadata__"]
    first, second, last = header[keys[0]], header[keys[1]], header[keys[-1]]
    if kind == "trailing bytes":
        return _with_header(header, data + b"\0"), Corrupt
    if kind == "overlap":
        second["data_offsets"] = first["data_offsets"]
        return _with_header(header, data), WrongShape
    if kind == "overlap of equal sizes":
        # two tensors at one place leave a hole elsewhere
        a, b = keys[0], keys[1]
        header[b] = dict(header[a])
        return _with_header(header, data), Corrupt
    if kind == "hole":
        for key in keys[1:]:
            header[key]["data_offsets"] = [o + 8 for o in header[key]["data_offsets"]]
        return _with_header(header, data + bytes(8)), Corrupt
    if kind == "beyond the end":
        last["data_offsets"][1] += 8
        return _with_header(header, data), WrongShape
    if kind == "backwards":
        last["data_offsets"].reverse()
        return _with_header(header, data), Corrupt
    if kind == "negative":
        first["data_offsets"][0] = -8
        return _with_header(header, data), Corrupt
    if kind == "huge shape":
        first["shape"] = [1 << 61, 1 << 61]
        return _with_header(header, data), WrongShape
    if kind == "shape of floats":
        first["shape"] = [8.0]
        return _with_header(header, data), Corrupt
    if kind == "unknown dtype":
        first["dtype"] = "F8_E4M3"
        return _with_header(header, data), UnsupportedVersion
    if kind == "extra field":
        first["more"] = 1
        return _with_header(header, data), Corrupt
    if kind == "metadata of numbers":
        header["__metadata__"]["impart_format_version"] = 1
        return _with_header(header, data), Corrupt
    if kind == "no metadata":
        del header["__metadata__"]
        return _with_header(header, data), UnsupportedVersion
    if kind == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(keys[0])}: {json.dumps(first)}}}"
        return _with_header(text.encode(), data), Corrupt
    if kind == "array":
        return _with_header(b"[]", data), Corrupt
    if kind == "deep":
        return _with_header(b"[" * 200_000, data), Corrupt
    if kind == "not UTF-8":
        return _with_header(b'{"\xff": 1}', data), Corrupt
    assert kind == "pickle"
    return b"\x80\x04\x95" + bytes(100), TooLarge


@pytest.mark.parametrize(
    "kind",
    [
        "trailing bytes", "overlap", "overlap of equal sizes", "hole", "beyond the end",
        "backwards", "negative", "huge shape", "shape of floats", "unknown dtype", "extra field",
        "metadata of numbers", "no metadata", "twice", "array", "deep", "not UTF-8",
    ],
)  # fmt: skip
def test_tensor_file_header_that_lies_raises(artifact: Path, kind: str) -> None:
    file = artifact / "delta.safetensors"
    raw, error = _lie(*_header(file.read_bytes()), kind)
    file.write_bytes(raw)
    seal(artifact)
    with pytest.raises(error):
        read_artifact(artifact)


@pytest.mark.parametrize("length", [(8 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_overlong_header_raises_too_large(artifact: Path, length: int) -> None:
    file = artifact / "delta.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    seal(artifact)
    with pytest.raises(TooLarge):
        read_artifact(artifact)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "impart-delta", "format": "impart-delta"}',
        b'{"format": "impart-delta", "format_version": 1}',
        b'{"seed": NaN}',
        b'{"seed": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_config_that_does_not_parse_raises_corrupt(artifact: Path, text: bytes) -> None:
    (artifact / "delta_config.json").write_bytes(text)
    seal(artifact)
    with pytest.raises(Corrupt):
        read_config(artifact)


@pytest.mark.parametrize(
    "change",
    [
        {"created_by": 1},
        {"codec": None},
        {"options": []},
        {"ratio_requested": "x"},
        {"finetuned_bytes": 1.5},
        {"finetuned_bytes": True},
        {"finetuned": {}},
        {"base": None},
        {"base": {}},
        {"seed": None},
        {"tensors": {}},
        {"tensors": [1]},
        {"unchanged": [1]},
        {"unchanged": None},
        {"bytes": {"x": 1.5}},
        {"fidelity": []},
    ],
)
def test_config_field_of_wrong_type_raises_corrupt(artifact: Path, change) -> None:
    edit_config(artifact, lambda record: record.update(change))
    with pytest.raises(Corrupt):
        read_config(artifact)
