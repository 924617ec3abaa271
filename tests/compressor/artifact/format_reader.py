"""A reader of delta artifacts written from ``compressor/artifact/FORMAT.md`` alone.

It imports nothing of ours, on purpose: where it and the project's own reader disagree, either the
page or the project is wrong. Section numbers are those of the page. It trusts what it reads.
"""

from __future__ import annotations

import hashlib
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

Parts = dict[str, np.ndarray]
Params = dict[str, Any]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I16": "<i2", "U8": "u1"}


class Tensor(NamedTuple):
    """A changed parameter: its entry, each term as a float32 matrix, and its exact rows."""

    entry: dict[str, Any]
    terms: list[np.ndarray]
    exact: np.ndarray | None

    def value(self, base: np.ndarray) -> np.ndarray:
        """Section 5: the fine-tune's value from the base's, in ``[out, in]`` orientation."""
        kind = np.float32 if base.dtype.kind == "f" else np.float64
        value = np.zeros(self.entry["shape"], kind)
        value[: len(base)] = base
        for term in self.terms:
            value[: len(base)] += term
        if self.exact is not None:
            start = self.entry["exact"]["row_start"]
            value[start : start + len(self.exact)] = self.exact
        return value


def read(path: Path) -> tuple[str, dict[str, Any], list[Tensor]]:
    """Return digest, configuration and tensors of a directory (sections 1, 2 and 5)."""
    sums = (path / "SHA256SUMS").read_bytes()
    for line in sums.decode("ascii").splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest, name
    config = json.loads((path / "delta_config.json").read_bytes())
    assert config["format"] == "impart-delta"
    assert config["format_version"] in (1, 2, 3)
    raw = (path / "delta.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    parts = tensors_of(raw[8 : 8 + length], raw[8 + length :])
    if config["format_version"] == 2 or "coding" in config:
        parts = tensors_of(*decoded(parts))
    tensors = []
    for i, entry in enumerate(config["tensors"]):
        shape = entry.get("base_shape", entry["shape"])
        terms = [
            CODECS[term["codec"]](shape, term["params"], inner(parts, f"{i}.{t}."))
            for t, term in enumerate(entry.get("terms", []))
        ]
        tensors.append(Tensor(entry, terms, parts.get(f"{i}.exact")))
    return hashlib.sha256(sums).hexdigest(), config, tensors


def tensors_of(header: bytes, data: bytes) -> Parts:
    """Section 3."""
    found = {}
    for key, entry in json.loads(header).items():
        if key != "__metadata__":
            start, end = entry["data_offsets"]
            array = np.frombuffer(data[start:end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            found[key] = array.reshape(entry["shape"])
    return found


def decoded(frames: Parts) -> tuple[bytes, bytes]:
    """Section 4: header and data."""
    raw = {key: zstandard.decompress(frame.tobytes()) for key, frame in frames.items()}
    return raw.pop("index"), b"".join(raw[str(number)] for number in range(len(raw)))


def inner(parts: Parts, prefix: str) -> Parts:
    return {k.removeprefix(prefix): part for k, part in parts.items() if k.startswith(prefix)}


def base_identity(config: dict[str, Any], shards: list[bytes]) -> str:
    """Section 8: from a base's configuration and the bytes of its safetensors files."""
    lines = {}
    for raw in shards:
        (length,) = struct.unpack("<Q", raw[:8])
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        for name, entry in header.items():
            if name != "__metadata__":
                tensor = data[slice(*entry["data_offsets"])]
                shape, sample = ",".join(map(str, entry["shape"])), tensor
                if (size := len(tensor)) > 65536:
                    starts = [i * (size - 4096) // 15 for i in range(16)]
                    sample = b"".join(tensor[start : start + 4096] for start in starts)
                digest = hashlib.sha256(sample).hexdigest()
                lines[name] = f"{name}\t{entry['dtype']}\t{shape}\t{digest}\n"
    text = json.dumps(stable(config), sort_keys=True, separators=(",", ":"))
    found = f"impart-base 1\n{text}\n" + "".join(lines[name] for name in sorted(lines))
    return hashlib.sha256(found.encode()).hexdigest()


def stable(value: Any) -> Any:
    left_out = {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype"}
    left_out |= {"dtype", "use_cache"}
    if isinstance(value, dict):
        return {key: stable(item) for key, item in value.items() if key not in left_out}
    return [stable(item) for item in value] if isinstance(value, list) else value


# --- section 6 ----------------------------------------------------------------------------------


def codes_of(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    stream = np.unpackbits(packed, bitorder="little")[: n * bits].reshape(n, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits))


def kernel_order(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[..., K, outputs]``."""
    fields = [packed >> (f * bits) & (2**bits - 1) for f in range(8 // bits)]
    return np.concatenate(fields, axis=-2).astype(np.int64)


def rows_of_codes(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """All n codes, row after row: of a bit stream, or of the transpose in kernel order."""
    if packed.ndim == 1:
        return codes_of(packed, bits, n)
    return np.swapaxes(kernel_order(packed, bits), -1, -2).reshape(n)


def levels(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes - (2**bits - 1) / 2).astype(np.float32)


def scales_of(stored: np.ndarray, unit: float) -> np.ndarray:
    if stored.dtype == np.uint8:
        return np.where(stored == 0, 0, 2 ** ((stored - 255.0) / 16) * unit).astype(np.float32)
    return stored.astype(np.float32) * np.float32(unit)


def runs(length: int, s: int) -> list[slice]:
    starts = [b * (length // s) + min(b, length % s) for b in range(s + 1)]
    return [slice(start, end) for start, end in pairwise(starts)]


def blockdiag(shape: list[int], params: Params, parts: Parts) -> np.ndarray:
    dense, done = np.zeros(shape, np.float32), 0
    blocks = list(zip(*(runs(size, params["n_blocks"]) for size in shape), strict=True))
    n = sum(dense[block].size for block in blocks)
    if params["bits"] == 16:
        values = scales_of(parts["values"], params["unit"])
        scales = np.ones(shape[0], np.float32)
    else:
        values = levels(rows_of_codes(parts["codes"], params["bits"], n), params["bits"])
        scales = scales_of(parts["scales"], params["unit"])
    for rows, cols in blocks:
        block = dense[rows, cols]
        block[:] = values[done : done + block.size].reshape(block.shape) * scales[rows, None]
        done += block.size
    return dense


def lowrank(shape: list[int], params: Params, parts: Parts) -> np.ndarray:
    rank, bits = params["rank"], params["bits"]

    def factor(name: str, size: int) -> np.ndarray:
        if bits >= 16:
            return scales_of(parts[name], params.get(f"unit_{name}", 1.0))
        scales = scales_of(parts[f"{name}_scales"], params[f"unit_{name}"])
        if name == "b" and parts["b"].ndim == 2:
            codes = kernel_order(parts["b"], bits)
        else:
            codes = rows_of_codes(parts[name], bits, rank * size).reshape(rank, size)
        return levels(codes, bits) * scales[:, None]

    return factor("b", shape[0]).T @ factor("a", shape[1])


def rows(shape: list[int], params: Params, parts: Parts) -> np.ndarray:
    dense, (m, n) = np.zeros(shape, np.float32), shape
    stored = codes_of(parts["mask"], 1, m).astype(bool)
    codes = rows_of_codes(parts["codes"], params["bits"], params["n_rows"] * n)
    values = levels(codes, params["bits"]).reshape(-1, n)
    dense[stored] = values * scales_of(parts["scales"], params["unit"])[:, None]
    return dense


def spread(values: np.ndarray, index: np.ndarray, block_rows: int, rank: int) -> np.ndarray:
    """``[size, rank]``: each row's values at the components of its block."""
    full = np.zeros((len(values), rank), np.float32)
    for i, row in enumerate(values):
        full[i, index[i // block_rows]] = row
    return full


def impart(shape: list[int], params: Params, parts: Parts) -> np.ndarray:
    u, v = (
        spread(parts[f"{s}_values"], parts[f"{s}_index"], params["block_rows"], params["rank"])
        for s in "uv"
    )
    return np.float32(params["unit_u"] * params["unit_v"]) * (u @ v.T)


def impart_qt(shape: list[int], params: Params, parts: Parts) -> np.ndarray:
    (m, n), rank, per_block = shape, params["rank"], params["block_rows"]
    weights = parts["weights"].astype(np.int64) + 1
    u, v = np.zeros((m, rank), np.float32), np.zeros((n, rank), np.float32)
    start, ends = 0, np.cumsum([min(rank, 2), min(max(rank - 2, 0), 32), max(rank - 34, 0)])
    for number, (bits, end) in enumerate(zip((8, 3, 2), ends, strict=True)):
        count, first = params[f"kept{bits}"], ends[number - 1] if number else 0
        n_bytes = -(-(m + n) * count * bits // 8)
        codes = codes_of(parts["codes"][start : start + n_bytes], bits, (m + n) * count)
        values = ((2 * codes + 1 - 2**bits) / 2**bits).reshape(m + n, count)
        start += n_bytes
        for side, full, own in (("u", u, values[:m]), ("v", v, values[m:])) if count else ():
            text = f"impart-qt\0{params['draw']}\0{side}\0{number}"
            index = first + draw(text, -(-len(full) // per_block), count, weights[first:end])
            full += spread(own, index, per_block, rank)
    q = weights.astype(np.float32) / np.float32(2**15)
    return (u * (scales_of(parts["sigma"], params["unit"]) / (q * q))) @ v.T


def draw(text: str, n_blocks: int, count: int, weights: np.ndarray) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")
    generator, order = np.random.PCG64(seed), list(range(n_blocks))
    for last in range(n_blocks - 1, 0, -1):
        other = int(generator.random_raw()) % (last + 1)
        order[last], order[other] = order[other], order[last]
    jitter = [int(generator.random_raw()) >> 24 for _ in order]
    offset = [(stratum * 2**40 + j) // n_blocks for stratum, j in zip(order, jitter, strict=True)]
    points = np.array(offset)[:, None] + np.arange(count) * 2**40
    return (np.cumsum(weights * 2**25) <= points[:, :, None]).sum(axis=2)


CODECS = {
    "blockdiag": blockdiag,
    "lowrank": lowrank,
    "rows": rows,
    "impart": impart,
    "impart-qt": impart_qt,
}
