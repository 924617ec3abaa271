"""A small artifact that uses every codec, and ways to damage one and seal it again."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.artifact.entropy import code_frame
from compressor.artifact.reader import BaseInfo, DeltaConfig, read_artifact, read_config
from compressor.artifact.writer import ArtifactWriter
from compressor.codecs import DenseRows, TensorDelta
from compressor.encoders.codec import make_encoder
from compressor.encoders.rows import encode_largest_rows
from compressor.encoders.sources import TensorSource
from compressor.plan.settings import with_bytes
from tests.compressor.artifact.mutations import read_frames, write_frames
from tests.compressor.codec_oracles import as_stream, encode, random_matrix

BASE = "ab" * 32
AUX = {"tokenizer.json": b'{"v": 1}', "chat_template.jinja": "{{ 'h\u00e9' }}".encode()}

CONFIG = DeltaConfig(
    created_by="0.1.0",
    codec="blockdiag",
    options={"bits": 3},
    ratio_requested=32.0,
    finetuned_bytes=123456,
    finetuned="me/ft",
    base=BaseInfo(BASE, "org/base", 1000, "bfloat16", (("lm_head.weight", "embed.weight"),)),
    seed=7,
    unchanged=("same.weight",),
    bytes={"linears": 100},
    fidelity={"kl_per_token": 0.01, "top1_agreement": 0.99, "n_tokens": 9, "text": "caf\u00e9"},
)


def deltas() -> list[TensorDelta]:
    """One tensor of every kind, not in the order of their names."""
    block = make_encoder("blockdiag", bits=3)
    made = []
    for name, shape, codec, params in [
        ("z.block", (11, 9), block, {"bits": 3, "n_blocks": 2}),
        ("y.columns", (12, 16), block, {"bits": 2, "n_blocks": 2}),
        ("y.low", (6, 16), make_encoder("lowrank", bits=2), {"bits": 2, "rank": 4}),
        ("b.half", (6, 6), block, {"bits": 16, "n_blocks": 3}),
        ("a.impart", (10, 8), make_encoder("impart"), IMPART),
        ("d.qt", (40, 38), make_encoder("impart-qt"), IMPART_QT),
        ("c.low", (5, 7), make_encoder("lowrank", bits=4), {"bits": 4, "rank": 3}),
    ]:
        terms = encode(codec, random_matrix(shape), params)
        made.append(TensorDelta(name, shape, shape, name == "c.low", terms, None))
    rows = (encode_largest_rows("e.rows", TensorSource(random_matrix((9, 7))), 4, 3),)
    made.append(TensorDelta("e.rows", (9, 7), (9, 7), False, rows, None))
    head = make_encoder("blockdiag", bits=4, head_fraction=0.5)
    params = head.fit((12, 8), 150)
    terms = encode(head, random_matrix((12, 8)), params)
    new = random_matrix((2, 8), 3, 1.0).bfloat16()
    made.append(TensorDelta("embed.weight", (14, 8), (12, 8), False, terms, DenseRows(12, new)))
    norm = random_matrix((1, 8), 4, 1.0)[0]
    made.append(TensorDelta("norm.weight", (8,), (8,), False, (), DenseRows(0, norm)))
    double = random_matrix((1, 5), 5, 1.0)[0].double()
    made.append(TensorDelta("new.bias", (5,), (0,), False, (), DenseRows(0, double)))
    return made


IMPART_QT = {"payload": 300, "beta": 0.0, "C": 1.0, "block_rows": 8, "gptq": False}
IMPART = {"kept": 3, "beta": 0.0, "C": 1.0, "block_rows": 4}


def write_artifact(
    path: Path, order: Callable[[list], list] = list, *, coded: bool = False, **options: Any
) -> str:
    config = CONFIG
    with ArtifactWriter(path, run_key="key", **options) as writer:
        for delta in order(deltas()):
            writer.add(delta, 0.5)
        if coded:
            found = writer.write_tensors(
                group_of=lambda entry, is_exact: "exact rows" if is_exact else entry.name[0],
                coded=True,
                always=True,
            )
            config = with_bytes(CONFIG, found)
        return writer.finish(config, AUX, lambda size: f"# card, {size} bytes\n".encode())


def write_as_version(path: Path, out: Path, version: int) -> None:
    """Write the artifact `path` to `out` as a release that wrote format version 1 or 2 would have:
    codes in bit streams, never entropy coded (1) or always (2).
    """
    import zstandard

    artifact, header = read_artifact(path), b'"impart_format_version":"'
    config = replace(artifact.config, coding=None)
    with ArtifactWriter(out, run_key="key") as writer:
        for delta in artifact.tensors:
            terms = tuple(as_stream(term) for term in delta.terms)
            writer.add(replace(delta, terms=terms), 0.5)
        if version == 2:
            written = writer.write_tensors(
                group_of=lambda entry, is_exact: entry.name, coded=True, always=True
            )
            config = with_bytes(config, written)
        writer.finish(config, artifact.aux)
    file = out / "delta.safetensors"
    if version == 2:
        frames = read_frames(file.read_bytes())
        index = zstandard.decompress(frames["index"])
        frames["index"] = code_frame(index.replace(header + b"3", header + b"1"))
        file.write_bytes(write_frames(frames, "2"))
    else:
        file.write_bytes(file.read_bytes().replace(header + b"3", header + b"1"))
    edit_config(out, lambda record: record.update(format_version=version))
    assert read_config(out).format_version == version


def seal(path: Path) -> None:
    """Make SHA256SUMS right again after a change, as an attacker would."""
    uncovered = ("README.md", "SHA256SUMS", "SHA256SUMS.sig")
    names = sorted(p.name for p in path.iterdir() if p.name not in uncovered)
    lines = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (path / "SHA256SUMS").write_text("".join(lines))


def edit_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "delta_config.json"
    record = json.loads(file.read_bytes())
    change(record)
    file.write_text(json.dumps(record))
    seal(path)


def edit_entry(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    def apply(record: dict[str, Any]) -> None:
        (entry,) = [entry for entry in record["tensors"] if entry["name"] == name]
        change(entry)

    edit_config(path, apply)


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and write them with the safetensors library."""
    file = path / "delta.safetensors"
    with safe_open(file, "pt") as stored:
        tensors = {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    change(tensors)
    save_file(tensors, file, metadata)
    seal(path)


def key_of(path: Path, name: str, rest: str) -> str:
    record = json.loads((path / "delta_config.json").read_bytes())
    names = [entry["name"] for entry in record["tensors"]]
    return f"{names.index(name)}.{rest}"


def same_delta(one: TensorDelta, two: TensorDelta) -> None:
    assert (one.name, one.shape, one.base_shape, one.transposed) == (
        two.name,
        two.shape,
        two.base_shape,
        two.transposed,
    )
    assert [t.codec for t in one.terms] == [t.codec for t in two.terms]
    for a, b in zip(one.terms, two.terms, strict=True):
        assert a.params() == b.params()
        assert torch.equal(a.to_dense(), b.to_dense())
    assert (one.exact is None) == (two.exact is None)
    if one.exact is not None and two.exact is not None:
        assert one.exact.row_start == two.exact.row_start
        assert one.exact.values.dtype == two.exact.values.dtype
        assert torch.equal(one.exact.values, two.exact.values)


@contextmanager
def limited_memory(room_bytes: int) -> Iterator[None]:
    """Whoever asks for more than `room_bytes` of new address space gets a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
