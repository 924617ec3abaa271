"""What entropy coding would save on disk: order-0 entropy of real artifacts' codes and scales.

    python -m benchmarks.entropy DELTA...

For every stored part the bytes now, and the least any order-0 coder (rANS, Huffman, zstd's
entropy stage) could make of it: the empirical entropy of its symbols by tensor, plus a byte a
symbol for the table. zlib and lzma run over the whole tensor file, for anything of higher order.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.artifact.reader import read_artifact
from compressor.codecs import Term
from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.impart_qt import ImpartQtTerm
from compressor.codecs.impart_qt_sampling import CLASS_BITS
from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.packing import unpack_bits
from compressor.codecs.rows import RowsTerm


@dataclass(frozen=True, slots=True)
class Part:
    """Symbols of one stored part, ``int64 [N]``, and the bits that each takes now."""

    what: str
    symbols: Tensor
    bits: int

    @property
    def now_bytes(self) -> float:
        return len(self.symbols) * self.bits / 8

    @property
    def coded_bytes(self) -> float:
        """At the order-0 entropy with a byte a symbol for the table; as it is if that is less."""
        counts = torch.unique(self.symbols, return_counts=True)[1].double()
        entropy = float(-(counts / counts.sum()).log2().mul(counts).sum())
        return min(self.now_bytes, entropy / 8 + len(counts))


def parts(term: Term) -> Iterator[Part]:
    """Symbols of a term: codes at their own width, everything else byte by byte."""
    stored = dict(term.tensors())
    match term:
        case BlockDiagTerm() if term.bits < 16:
            del stored["codes"]
            yield Part(f"blockdiag codes, {term.bits} bit", term.codes.long(), term.bits)
        case RowsTerm():
            del stored["codes"]
            yield Part(f"rows codes, {term.bits} bit", term.codes.flatten().long(), term.bits)
        case ImpartQtTerm():
            del stored["codes"]
            sides = [c.split(list(term.kept), dim=1) for c in (term.u_codes, term.v_codes)]
            for bits, u, v in zip(CLASS_BITS, *sides, strict=True):
                symbols = torch.cat([u.flatten(), v.flatten()]).long()
                yield Part(f"impart-qt codes, {bits} bit", symbols, bits)
        case LowRankTerm():
            bits = term.params()["bits"]
            for name in [
                name for name in stored if bits < 16 and stored[name].dtype == torch.uint8
            ]:
                packed = stored.pop(name)
                symbols = unpack_bits(packed, bits, 8 * len(packed) // bits).long()
                yield Part(f"head codes, {bits} bit", symbols, bits)
    for name, tensor in stored.items():
        yield Part(f"{term.codec} {name}, bytes", tensor.contiguous().view(torch.uint8).long(), 8)


def report(delta: Path) -> None:
    """Print the rows of one artifact."""
    now: dict[str, float] = {}
    coded: dict[str, float] = {}
    artifact = read_artifact(delta)
    for tensor in artifact.tensors:
        for part in (part for term in tensor.terms for part in parts(term)):
            symbols = Part(part.what, part.symbols.flatten(), part.bits)
            now[part.what] = now.get(part.what, 0.0) + symbols.now_bytes
            coded[part.what] = coded.get(part.what, 0.0) + symbols.coded_bytes
    total = sum(file.stat().st_size for file in delta.iterdir())
    if artifact.config.coding is not None:  # as it would be without its coding, but for the header
        total += sum(artifact.config.coding.raw_bytes.values())
        total -= sum(artifact.config.bytes.values())
    for what, n_bytes in now.items():
        row(delta.name, what, n_bytes, coded[what])
    saved = sum(now.values()) - sum(coded.values())
    row(delta.name, "whole artifact", total, total - saved)
    data = (delta / "delta.safetensors").read_bytes()
    for name, packed in (("zlib", zlib.compress(data, 9)), ("lzma", lzma.compress(data))):
        row(delta.name, f"tensor file by {name}", len(data), len(packed))


def row(delta: str, what: str, now: float, coded: float) -> None:
    print(f"| {delta} | {what} | {now:,.0f} | {coded:,.0f} | {1 - coded / now:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("deltas", type=Path, nargs="+")
    torch.set_num_threads(1)
    print("| artifact | part | bytes | at order-0 entropy | saved |\n|---|---|---:|---:|---:|")
    for delta in parser.parse_args().deltas:
        report(delta)


if __name__ == "__main__":
    main()
