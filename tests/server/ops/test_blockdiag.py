"""Block-diagonal products from packed codes, every implementation against float64 loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.codecs.columns import pack_columns
from server.ops.choose import choose_kernels
from server.ops.kernels import Kernels
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import SlotSegments

CPU = torch.device("cpu")
SHAPES = [
    (4, (64,), 48),
    (5, (50, 23, 7), 37),
    (3, (200,), 33),  # wider than one tile
    (1, (40,), 70),
    (6, (6, 130), 6),
]
SEGMENTS = [(0, 1, 4), (2, 4, 75), (1, 80, 81)]  # rows 0 and 75..79 belong to the base
N_ROWS = 82


@pytest.fixture(scope="module", params=["torch", "numba"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return choose_kernels(request.param, CPU, torch.float32)


def make(s: int, sizes: tuple[int, ...], n: int, bits: int) -> PackedBlocks:
    generator = torch.Generator().manual_seed(bits * 1000 + n)
    nb, mb = -(-n // s), sum(-(-m // s) for m in sizes)
    if bits == 16:
        codes = torch.randn(3, s, nb, mb, generator=generator).half()
    else:
        shape = (3, s, nb, mb)
        raw = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
        codes = pack_columns(raw, bits)
    scales = torch.rand(3, s, mb, generator=generator).half() * 2.0**-20  # subnormals too
    units = torch.rand(3, len(sizes), generator=generator) * 2.0**18
    if bits in (2, 8):  # with scales of one byte
        scales = torch.randint(0, 256, (3, s, mb), dtype=torch.uint8, generator=generator)
        units *= 2.0**-18
    return PackedBlocks(codes, scales, units, sizes, n, bits)


def run(size: int, parts: int, part: int) -> range:
    start = part * (size // parts) + min(part, size % parts)
    return range(start, start + size // parts + (part < size % parts))


def dense(blocks: PackedBlocks, slot: int) -> list[Tensor]:
    """Each matrix in float64, element by element from the definition."""
    s, found, column = blocks.n_blocks, [], 0
    centre = 0.0 if blocks.bits == 16 else (2**blocks.bits - 1) / 2
    for place, m in enumerate(blocks.sizes):
        matrix = torch.zeros(m, blocks.n, dtype=torch.float64)
        for b in range(s):
            for i, row in enumerate(run(m, s, b)):
                scale = scale_at(blocks, slot, b, column + i) * float(blocks.units[slot, place])
                for j, col in enumerate(run(blocks.n, s, b)):
                    code = code_at(blocks, slot, b, j, column + i)
                    matrix[row, col] = (code - centre) * scale
        found.append(matrix)
        column += -(-m // s)
    return found


def scale_at(blocks: PackedBlocks, slot: int, b: int, i: int) -> float:
    stored = blocks.scales[slot, b, i]
    if blocks.scales.dtype is torch.float16:
        return float(stored)
    return 2.0 ** ((int(stored) - 255) / 16) if int(stored) else 0.0


def code_at(blocks: PackedBlocks, slot: int, b: int, j: int, i: int) -> float:
    nb, bits = -(-blocks.n // blocks.n_blocks), blocks.bits
    column = blocks.codes[slot, b, :, i]
    if bits == 16:
        return float(column[j])
    if bits == 3:
        low, high = -(-nb // 4), -(-nb // 8)
        two = (int(column[j % low]) >> (2 * (j // low))) & 3
        return two + 4 * ((int(column[low + j % high]) >> (j // high)) & 1)
    rows = -(-nb * bits // 8)
    return (int(column[j % rows]) >> (bits * (j // rows))) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("s", "sizes", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockdiag_mixed_segments_equal_float64_loops(
    kernels: Kernels, s: int, sizes: tuple[int, ...], n: int, bits: int, dtype: torch.dtype
) -> None:
    blocks = make(s, sizes, n, bits)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N_ROWS, n, generator=generator).to(dtype)
    fused = torch.randn(N_ROWS, sum(sizes), generator=generator).to(dtype)
    outputs = list(torch.split(fused, list(sizes), dim=1))
    want = [y.double().clone() for y in outputs]
    for slot, start, end in SEGMENTS:
        for y, matrix in zip(want, dense(blocks, slot), strict=True):
            y[start:end] += x[start:end].double() @ matrix.T
    table = SlotSegments(torch.tensor(SEGMENTS), len(SEGMENTS), 71)
    kernels.blockdiag(blocks).add_(outputs, x, table)
    tolerance = 1e-5 if dtype is torch.float32 else 2.0**-7
    for y, w in zip(outputs, want, strict=True):
        torch.testing.assert_close(
            y.double(), w, rtol=tolerance, atol=tolerance * float(w.abs().mean())
        )


def test_blockdiag_output_left_out_stays_untouched(kernels: Kernels) -> None:
    blocks = make(5, (50, 23, 7), 37, 4)
    x = torch.randn(N_ROWS, 37, generator=torch.Generator().manual_seed(1))
    outputs = [torch.zeros(N_ROWS, m) for m in blocks.sizes]
    table = SlotSegments(torch.tensor(SEGMENTS), len(SEGMENTS), 71)
    kernels.blockdiag(blocks).add_([outputs[0], None, outputs[2]], x, table)
    assert outputs[0].any()
    assert not outputs[1].any()
    assert outputs[2].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockdiag_row_of_nan_spoils_no_other_row(
    kernels: Kernels, bits: int, dtype: torch.dtype
) -> None:
    blocks = make(3, (200,), 33, bits)
    x = torch.randn(N_ROWS, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[10] = float("nan")
    y = torch.zeros(N_ROWS, 200, dtype=dtype)
    table = SlotSegments(torch.tensor(SEGMENTS), len(SEGMENTS), 71)
    kernels.blockdiag(blocks).add_([y], x, table)
    spoiled = y.isnan().any(1).nonzero().flatten().tolist()
    assert spoiled == [10]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(("s", "sizes", "n"), [(5, (50,), 37), (3, (200,), 33), (4, (64,), 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blockdiag_rows_look_up_equals_float64_loops(
    kernels: Kernels, s: int, sizes: tuple[int, ...], n: int, bits: int, dtype: torch.dtype
) -> None:
    blocks = make(s, sizes, n, bits)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, sizes[0], (30,), generator=generator)
    places = torch.randint(-1, 3, (30,), generator=generator)
    y = torch.randn(30, n, generator=generator).to(dtype)
    matrices = [dense(blocks, place)[0] for place in range(3)]
    want = y.double()
    for row, (place, token) in enumerate(zip(places.tolist(), ids.tolist(), strict=True)):
        if place >= 0:
            want[row] += matrices[place][token]
    before = y.clone()
    kernels.blockdiag_rows_add_(y, ids, places, blocks)
    tolerance = 1e-5 if dtype is torch.float32 else 2.0**-8
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=1e-5)
    assert torch.equal(y[places < 0], before[places < 0])


def test_blockdiag_rows_of_nan_stay_in_their_place(kernels: Kernels) -> None:
    blocks = make(4, (64,), 48, 4)
    blocks.units[1] = float("nan")
    y = torch.zeros(3, 48)
    kernels.blockdiag_rows_add_(y, torch.tensor([3, 3, 3]), torch.tensor([0, -1, 2]), blocks)
    assert bool(y.isfinite().all())
