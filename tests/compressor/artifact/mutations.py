"""Ways to damage the files of an artifact, driven by a `random.Random` (hypothesis has one too)."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

CONFIG, TENSORS, CHECKSUMS = "delta_config.json", "delta.safetensors", "SHA256SUMS"

Files = dict[str, bytes]

# Values that have broken readers before: sizes at the edge of an integer type, numbers that are no
# numbers, text that a terminal or a markup would obey, structures deeper than a parser's stack.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 7, 8, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**40,
    2**62, 2**63, 2**64, 10**30, -(10**30), 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308,
    float("nan"), float("inf"), "", "x", "0", "exact", "blockdiag", "impart", "lowrank", "bits",
    "rows", "n_rows",
    "\x1b[2J", "\x00", "\ud800", "[/bold]", "[red]", "<script>", "../../x", "a" * 5000, "é",
    [], {}, [0], [[]], [1, 2, 3, 4, 5], {"a": 1}, ["x", "y"], {"codec": "impart", "params": {}},
)  # fmt: skip
_DEPTHS = (30, 200, 900, 100_000)


def read_files(path: Path) -> Files:
    """All files of an artifact by name."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def write_files(path: Path, files: Files) -> None:
    """Make `path` hold exactly these."""
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        if old.name not in files:
            old.unlink()
    for name, raw in files.items():
        file = path / name
        if not file.exists() or file.read_bytes() != raw:
            file.write_bytes(raw)


def sealed(files: Files) -> Files:
    """The same with right checksums, as an attacker would leave them."""
    names = sorted(name for name in files if name not in (CHECKSUMS, "README.md"))
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names]
    return files | {CHECKSUMS: "".join(lines).encode()}


# --- bytes --------------------------------------------------------------------------------------


def mutate_bytes(raw: bytes, random: Random) -> bytes:
    """A few flips, cuts, splices, repeats and overwritten numbers at random places."""
    changed = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        random.choice(_BYTE_CHANGES)(changed, random)
    return bytes(changed)


def _place(raw: bytearray, random: Random) -> int:
    # The structure is at the beginning of both formats; look there half of the time.
    end = len(raw) if random.random() < 0.5 else min(len(raw), 600)
    return random.randint(0, max(0, end - 1))


def _flip(raw: bytearray, random: Random) -> None:
    if raw:
        raw[_place(raw, random)] ^= 1 << random.randint(0, 7)


def _set(raw: bytearray, random: Random) -> None:
    if raw:
        raw[_place(raw, random)] = random.choice(b'\0\xff\x7f0159-.,:"{}[]ehtnu ')


def _cut(raw: bytearray, random: Random) -> None:
    del raw[_place(raw, random) :]


def _remove(raw: bytearray, random: Random) -> None:
    start = _place(raw, random)
    del raw[start : start + random.choice((1, 2, 8, 64, 1000))]


def _splice(raw: bytearray, random: Random) -> None:
    start, target = _place(raw, random), _place(raw, random)
    part = raw[start : start + random.choice((1, 2, 8, 64, 1000))]
    raw[target : target + random.choice((0, len(part)))] = part


def _number(raw: bytearray, random: Random) -> None:
    start = random.choice((0, _place(raw, random)))
    size = random.choice(("<Q", "<q", "<H", "<e"))
    extremes = {"<Q": (0, 1, 2**32, 2**63, 2**64 - 1), "<q": (-1, -(2**63), 2**23)}
    values = extremes.get(size, (0, 1, 255) if size == "<H" else (float("nan"), 65504.0))
    raw[start : start + struct.calcsize(size)] = struct.pack(size, random.choice(values))


_BYTE_CHANGES: tuple[Callable[[bytearray, Random], None], ...] = (
    _flip, _set, _cut, _remove, _splice, _number,
)  # fmt: skip

# --- JSON ---------------------------------------------------------------------------------------


def mutate_json(value: Any, random: Random) -> Any:
    """Change a few nodes of a JSON tree in place (and return it, or what replaces its root)."""
    for _ in range(random.randint(1, 3)):
        nodes = list(_nodes(value))
        if not nodes:
            return value
        holder, key = random.choice(nodes)
        _change_node(holder, key, random, nodes)
    return value


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every node below the root; all levels equally likely."""
    levels: list[list[tuple[Any, Any]]] = []
    current = [value]
    while current:
        found = [
            (holder, key)
            for holder in current
            for key in (
                list(holder)
                if isinstance(holder, dict)
                else range(len(holder))
                if isinstance(holder, list)
                else ()
            )
        ]
        levels.append(found)
        current = [holder[key] for holder, key in found]
    longest = max(map(len, levels))
    return [node for level in levels if level for node in level * max(1, longest // len(level))]


def _change_node(holder: Any, key: Any, random: Random, nodes: list[tuple[Any, Any]]) -> None:
    kind = random.randint(0, 6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 1:
        holder[random.choice(("x", "exact", "terms", "base_shape"))] = holder.pop(key)
    elif kind == 2:
        other, place = random.choice(nodes)
        holder[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and isinstance(holder[key], int):
        holder[key] += random.choice((-1, 1, 7, 8, 1 << 20))
    elif kind == 4 and random.random() < 0.1:
        holder[key] = _Deep(random.choice(_DEPTHS))
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))  # the table itself stays as it is


class _Deep(int):
    """Stands for that many nested lists, which `json.dumps` itself could not write."""


def dump(value: Any) -> bytes:
    """JSON text of a mutated tree; deep lists are spelt out afterwards."""
    depths: list[int] = []

    def plain(node: Any) -> Any:
        if isinstance(node, _Deep):
            depths.append(int(node))
            return f"@deep{len(depths) - 1}@"
        if isinstance(node, dict):
            return {key: plain(item) for key, item in node.items()}
        return [plain(item) for item in node] if isinstance(node, list) else node

    text = json.dumps(plain(value))
    for number, depth in enumerate(depths):
        text = text.replace(f'"@deep{number}@"', "[" * depth + "]" * depth)
    return text.encode()


# --- whole artifacts ----------------------------------------------------------------------------


def mutate_any_bytes(files: Files, random: Random) -> Files:
    """Bytes of one or two files, checksums right or not; a file may vanish or move."""
    files = dict(files)
    for _ in range(random.randint(1, 2)):
        name = random.choice(sorted(files))
        files[name] = mutate_bytes(files[name], random)
        if random.random() < 0.05:
            files[random.choice((CONFIG, TENSORS, "vocab.json"))] = files.pop(name)
    return sealed(files) if random.random() < 0.7 else files


def mutate_config(files: Files, random: Random) -> Files:
    """The configuration as a tree."""
    config = dump(mutate_json(json.loads(files[CONFIG]), random))
    return sealed(files | {CONFIG: config})


def mutate_header(files: Files, random: Random) -> Files:
    """The tensor file's header as a tree; its data sometimes too."""
    raw = files[TENSORS]
    (length,) = struct.unpack("<Q", raw[:8])
    header = dump(mutate_json(json.loads(raw[8 : 8 + length]), random))
    data = raw[8 + length :]
    if random.random() < 0.2:
        data = mutate_bytes(data, random)
    return sealed(files | {TENSORS: struct.pack("<Q", len(header)) + header + data})


def mutate_order(files: Files, random: Random) -> Files:
    """Other dimensions for parts of bytes, of as many bytes: the order of their codes."""
    raw = files[TENSORS]
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    parts = [part for part in header.values() if part.get("dtype") == "U8"]
    for part in random.sample(parts, min(len(parts), random.randint(1, 3))):
        start, end = part["data_offsets"]
        rest, part["shape"] = end - start, []
        for _ in range(random.randint(0, 2)):
            factor = random.choice([f for f in range(1, 33) if rest % f == 0])
            part["shape"].append(factor)
            rest //= factor
        part["shape"].append(rest)
    text = json.dumps(header).encode()
    return sealed(files | {TENSORS: struct.pack("<Q", len(text)) + text + raw[8 + length :]})


def mutate_frames(files: Files, random: Random) -> Files:
    """Of an entropy coded artifact: what a frame holds, or a whole frame; header made right."""
    import zstandard

    frames = read_frames(files[TENSORS])
    name = random.choice(list(frames))
    kind = random.randint(0, 3)
    if kind == 0:
        frames[name] = mutate_bytes(frames[name], random)
    elif kind == 1:
        frames[name] = frames[random.choice(list(frames))]
    else:
        raw = zstandard.ZstdDecompressor().decompress(frames[name])
        is_tree = name == "index" and kind == 2
        tree = dump(mutate_json(json.loads(raw), random)) if is_tree else b""
        frames[name] = zstandard.ZstdCompressor().compress(tree or mutate_bytes(raw, random))
    return sealed(files | {TENSORS: write_frames(frames)})


def read_frames(raw: bytes) -> dict[str, bytes]:
    """The frames of an entropy coded tensor file by name."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    del header["__metadata__"]
    return {key: data[slice(*entry["data_offsets"])] for key, entry in header.items()}


def write_frames(frames: dict[str, bytes], version: str = "3") -> bytes:
    """Inverse of `read_frames`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "impart_format_version": version}}
    start = 0
    for key, frame in frames.items():
        offsets = [start, start + len(frame)]
        header[key] = {"dtype": "U8", "shape": [len(frame)], "data_offsets": offsets}
        start += len(frame)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(frames.values())


def mutate_both(files: Files, random: Random) -> Files:
    """Configuration and header together."""
    return mutate_header(mutate_config(files, random), random)


MUTATIONS: tuple[Callable[[Files, Random], Files], ...] = (
    mutate_any_bytes, mutate_config, mutate_header, mutate_both,
    mutate_order,
)  # fmt: skip
CODED_MUTATIONS = (*MUTATIONS, mutate_frames, mutate_frames)  # most of it is frames
