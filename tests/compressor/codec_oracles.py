"""Element loops in float64, written from the format's description alone, and shared checks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from compressor.codecs import (
    BlockDiagTerm,
    ImpartQtTerm,
    ImpartTerm,
    LowRankTerm,
    Params,
    RowsTerm,
    Term,
)
from compressor.codecs.impart_sampling import sample_blocks
from compressor.codecs.packing import pack_bits
from compressor.encoders.codec import Codec
from compressor.encoders.sources import TensorSource

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))
ODD_SHAPES = [(13, 7), (7, 13), (1, 5), (5, 1), (1, 1), (16, 16), (37, 64), (130, 41)]


def random_matrix(shape: tuple[int, int], seed: int = 0, scale: float = 1e-3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def encode(codec: Codec, matrix: Tensor, params: Params, seed: int = 0) -> tuple[Term, ...]:
    return codec.encode("layer.weight", TensorSource(matrix), params, seed)


def payload(terms: tuple[Term, ...]) -> int:
    return sum(len(part.numpy().tobytes()) for t in terms for part in t.tensors().values())


def bit_codes(packed: Tensor, bits: int, n: int) -> list[int]:
    """Codes from a little-endian bit stream, one bit at a time."""
    stream = [int(byte) >> bit & 1 for byte in packed.tolist() for bit in range(8)]
    return [sum(stream[e * bits + b] << b for b in range(bits)) for e in range(n)]


def column_code(packed: Tensor, bits: int, k: int, i: int) -> int:
    """Code ``[k, i]`` of ``[byte rows, outputs]`` in the order of kernels."""
    field, row = divmod(k, len(packed))
    return int(packed[row, i]) >> (field * bits) & (2**bits - 1)


def row_codes(packed: Tensor, bits: int, n_rows: int, n: int) -> list[int]:
    """Codes row after row, from a bit stream or from ``[byte rows of n, n_rows]``."""
    if packed.ndim == 1:
        return bit_codes(packed, bits, n_rows * n)
    return [column_code(packed, bits, j, i) for i in range(n_rows) for j in range(n)]


def as_stream(term: Term) -> Term:
    """The same term with its codes in bit streams, as format versions 1 and 2 store them."""
    parts = dict(term.tensors())
    if isinstance(term, LowRankTerm):
        for name in ("a", "b"):
            parts[name] = pack_bits(term.codes(name).flatten(), term.bits)
    else:
        assert isinstance(term, BlockDiagTerm | RowsTerm)
        parts["codes"] = pack_bits(term.codes.flatten(), term.bits)
    return type(term).from_parts(term.shape, term.params(), parts)


def cuts(size: int, parts: int) -> list[range]:
    return [range(int(run[0]), int(run[-1]) + 1) for run in np.array_split(np.arange(size), parts)]


def dense_blockdiag(term: BlockDiagTerm) -> np.ndarray:
    """The matrix a stored `blockdiag` term stands for, from its parts on disk."""
    m, n = term.shape
    parts, params = term.tensors(), term.params()
    dense = np.zeros((m, n))
    rows, cols = cuts(m, params["n_blocks"]), cuts(n, params["n_blocks"])
    n_values = sum(len(r) * len(c) for r, c in zip(rows, cols, strict=True))
    if params["bits"] == 16:
        values = [float(v) * params["unit"] for v in parts["values"]]
    elif parts["codes"].ndim == 1:
        values = bit_codes(parts["codes"], params["bits"], n_values)
    else:
        size = len(rows[0]), len(cols[0])
        values = [c for block in parts["codes"] for c in row_codes(block, params["bits"], *size)]
    e = 0
    for block_rows, block_cols in zip(rows, cols, strict=True):
        for i in block_rows:
            for j in block_cols:
                if params["bits"] == 16:
                    dense[i, j] = values[e]
                else:
                    scale = float(parts["scales"][i]) * params["unit"]
                    if params.get("scale_bits") == 8:
                        step = int(parts["scales"][i])
                        scale = params["unit"] * 2 ** ((step - 255) / 16) if step else 0.0
                    dense[i, j] = (values[e] - (2 ** params["bits"] - 1) / 2) * scale
                e += 1
    return dense


def _factor(parts: dict[str, Tensor], name: str, size: int, params: Params) -> np.ndarray:
    rank, bits = params["rank"], params["bits"]
    if bits >= 16:
        return parts[name].double().numpy() * params.get(f"unit_{name}", 1.0)
    if name == "b" and parts[name].ndim == 2:
        codes = [column_code(parts[name], bits, k, j) for k in range(rank) for j in range(size)]
    else:
        codes = row_codes(parts[name], bits, rank, size)
    factor = np.zeros((rank, size))
    for k in range(rank):
        scale = float(parts[f"{name}_scales"][k]) * params[f"unit_{name}"]
        for j in range(size):
            factor[k, j] = (codes[k * size + j] - (2**bits - 1) / 2) * scale
    return factor


def dense_lowrank(term: LowRankTerm) -> np.ndarray:
    parts, params = term.tensors(), term.params()
    m, n = term.shape
    a, b = _factor(parts, "a", n, params), _factor(parts, "b", m, params)
    dense = np.zeros((m, n))
    for k in range(params["rank"]):
        for i in range(m):
            for j in range(n):
                dense[i, j] += b[k, i] * a[k, j]
    return dense


def dense_rows(term: RowsTerm) -> np.ndarray:
    parts, params = term.tensors(), term.params()
    m, n = term.shape
    bits, mask = params["bits"], bit_codes(parts["mask"], 1, m)
    codes = row_codes(parts["codes"], bits, params["n_rows"], n)
    dense = np.zeros((m, n))
    k = 0
    for i in range(m):
        if mask[i]:
            step = int(parts["scales"][k])
            scale = params["unit"] * 2 ** ((step - 255) / 16) if step else 0.0
            for j in range(n):
                dense[i, j] = (codes[k * n + j] - (2**bits - 1) / 2) * scale
            k += 1
    assert k == params["n_rows"]
    return dense


def dense_impart(term: ImpartTerm) -> np.ndarray:
    parts, params = term.tensors(), term.params()
    m, n = term.shape
    spread = {}
    for side, size in (("u", m), ("v", n)):
        full = np.zeros((size, params["rank"]))
        for i in range(size):
            for t in range(params["kept"]):
                k = int(parts[f"{side}_index"][i // params["block_rows"], t])
                full[i, k] = float(parts[f"{side}_values"][i, t]) * params[f"unit_{side}"]
        spread[side] = full
    dense = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            dense[i, j] = sum(spread["u"][i, k] * spread["v"][j, k] for k in range(params["rank"]))
    return dense


def dense_impart_qt(term: ImpartQtTerm) -> np.ndarray:
    """From the parts on disk: the draw of each class again, then one code at a time."""
    parts, params = term.tensors(), term.params()
    m, n = term.shape
    rank, block_rows = params["rank"], params["block_rows"]
    q = [(int(w) + 1) / 2**15 for w in parts["weights"]]
    counts = {bits: params[f"kept{bits}"] for bits in (8, 3, 2)}
    spread = {"u": np.zeros((m, rank)), "v": np.zeros((n, rank))}
    start = first = 0
    for index, (bits, n_class) in enumerate(zip((8, 3, 2), (2, 32, rank), strict=True)):
        count, end = counts[bits], min(first + n_class, rank)
        n_codes = (m + n) * count
        codes = bit_codes(parts["codes"][start : start + -(-n_codes * bits // 8)], bits, n_codes)
        start += -(-n_codes * bits // 8)
        for side, size in (("u", m), ("v", n)) if count else ():
            inclusion = np.array([round(value * 2**40) for value in q[first:end]])
            key = f"impart-qt\0{params['draw']}\0{side}\0{index}"
            drawn = sample_blocks(inclusion, -(-size // block_rows), key)
            offset = 0 if side == "u" else m * count
            for i in range(size):
                for t in range(count):
                    k = first + int(drawn[i // block_rows, t])
                    code = codes[offset + i * count + t]
                    spread[side][i, k] = (2 * code + 1 - 2**bits) / 2**bits / q[k]
        first = end
    sigma = [float(s) * params["unit"] for s in parts["sigma"]]
    return (spread["u"] * sigma) @ spread["v"].T


def oracle(term: Term) -> np.ndarray:
    if isinstance(term, ImpartQtTerm):
        return dense_impart_qt(term)
    if isinstance(term, BlockDiagTerm):
        return dense_blockdiag(term)
    if isinstance(term, LowRankTerm):
        return dense_lowrank(term)
    if isinstance(term, RowsTerm):
        return dense_rows(term)
    assert isinstance(term, ImpartTerm)
    return dense_impart(term)


def check_term(term: Term) -> None:
    """Everything a term can do agrees with the element loop over its stored parts."""
    m, n = term.shape
    expected = torch.from_numpy(oracle(term))
    scale = float(expected.abs().max()) or 1.0
    tolerance = {"rtol": 1e-5, "atol": 2e-6 * scale}
    torch.testing.assert_close(term.to_dense().double(), expected, **tolerance)
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ expected.T
    got = term.apply(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=2e-5 * scale * n**0.5)
    half = term.apply(x.bfloat16())
    torch.testing.assert_close(half, term.apply(x.bfloat16().float()))
    assert term.apply(x[:0]).shape == (0, m)
    ids = torch.tensor([0, m - 1, m // 2, 0])
    torch.testing.assert_close(term.dense_rows(ids).double(), expected[ids], **tolerance)
    assert term.dense_rows(ids[:0]).shape == (0, n)
    check_round_trip(term)


def check_round_trip(term: Term) -> None:
    """Parts -> term -> parts changes no bit."""
    parts = {name: part.clone() for name, part in term.tensors().items()}
    again = type(term).from_parts(term.shape, dict(term.params()), parts)
    assert again.params() == term.params()
    assert again.tensors().keys() == term.tensors().keys()
    for name, part in term.tensors().items():
        assert part.is_contiguous()
        assert again.tensors()[name].numpy().tobytes() == part.numpy().tobytes()
    assert torch.equal(again.to_dense(), term.to_dense())
