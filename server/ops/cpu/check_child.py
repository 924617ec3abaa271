"""``python -m server.ops.cpu.check_child NAME...``: compile kernels and compare them with torch.

With ``--end-with-stdin`` before the names the process ends when its standard input does. Prints
``[name, problem or null]`` in JSON, a line for each kernel as soon as it is known. The process may
end on the way: that is what it is for, see `server.ops.cpu.check`. Inputs are random and small;
what is compared with is torch on the same numbers in float64.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from compressor.codecs.columns import packed_rows
from server.ops.cpu.kernels import NumbaKernels
from server.ops.joined import TermArrays
from server.ops.kernels import Kernels, TorchKernels
from server.ops.lowrank import PackedLowRank
from server.ops.packed import PackedBlocks, PackedRows
from server.ops.row_mapping import RowMapping, Segment
from server.ops.selfcheck import Case, cases, deviation, randoms
from server.ops.torch_terms import TorchTerms

END_WITH_STDIN = "--end-with-stdin"
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
# Kernel -> how the names of its cases begin.
OF_KERNEL = {
    "attention": ("decode attention",),
    "prefill": ("prefill attention",),
    "rotary": ("rotate_and_write",),
    "rows": ("rms_norm", "add_rms_norm", "silu_mul"),
    "embedding": ("embedding",),
    "linear": ("linear", "blockdiag", "joined"),
    "widened": ("widened", "blockdiag", "joined"),
}


def main(names: list[str]) -> None:
    """Try the kernels one by one; see the module."""
    if names[:1] == [END_WITH_STDIN]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        names = names[1:]
    for name in names:
        print(json.dumps([name, find_problem(name)]), flush=True)


def _end_with_stdin() -> None:
    """A server that has ended, however it did, wants no kernels: its end of the pipe is closed."""
    while os.read(0, 1):
        pass
    os._exit(1)


def find_problem(name: str) -> str | None:
    """Compile one kernel; None if all its cases come out as in torch, else what is wrong."""
    if name not in OF_KERNEL:
        return "is unknown"
    try:
        kernels = NumbaKernels(usable={name})
    except Exception as error:  # the compiler's, whatever its type
        return f"cannot be compiled ({type(error).__name__}: {str(error).strip()[:200]})"
    for dtype in DTYPES:
        wrong = [
            case + problem
            for case, problem in deviations(kernels, dtype)
            if problem is not None and case.startswith(OF_KERNEL[name])
        ]
        if wrong:
            return f"is wrong in {str(dtype).removeprefix('torch.')} ({', '.join(wrong)[:200]})"
    return None


def deviations(kernels: Kernels, dtype: torch.dtype) -> Iterator[tuple[str, str | None]]:
    """Every case and what is wrong with it, see `deviation`."""
    reference = TorchKernels()
    with torch.inference_mode():
        exact = _cases(torch.float64, dtype)
        for (name, run), (_, wanted) in zip(_cases(dtype, dtype), exact, strict=True):
            told = deviation(run, kernels, lambda wanted=wanted: wanted(reference), dtype)  # type: ignore[misc]
            yield name, told


def _cases(dtype: torch.dtype, values_of: torch.dtype) -> Iterator[Case]:
    names = tuple(start for starts in OF_KERNEL.values() for start in starts)
    yield from (case for case in cases(CPU, dtype, values_of) if case[0].startswith(names))
    random, generator = randoms(CPU, dtype, values_of)
    for rows in (1, 2, 5, 70):
        yield f"widened, {rows} rows", _widened(rows, random)
    for bits in (2, 3, 4, 8, 16):
        for octaves in (False, True):
            yield f"embedding {bits} bit", _look_up(_blocks(37, bits, octaves, generator), random)
            if bits != 16:
                terms = _terms(38, bits, octaves, generator)
                for rows in (1, 11):
                    yield f"joined {bits} bit, {rows} rows", _product(terms, rows, random)
    weight, x, bias = random(70, 38), random(11, 38), random(70)
    yield "linear", lambda kernels: kernels.linear(weight)(x, bias)


def _blocks(
    n: int, bits: int, octaves: bool, generator: torch.Generator, m: int = 70, s: int = 3
) -> PackedBlocks:
    """Two slots' blocks of a matrix [m, n], of uneven parts."""
    nb, mb = -(-n // s), -(-m // s)
    if bits == 16:
        codes = torch.randn((2, s, nb, mb), generator=generator).half()
    else:
        shape = (2, s, packed_rows(nb, bits), mb)
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if octaves:
        scales = torch.randint(180, 256, (2, s, mb), generator=generator, dtype=torch.uint8)
    else:
        scales = torch.rand((2, s, mb), generator=generator).half()
    places = torch.tensor([2, 1], dtype=torch.int32)
    return PackedBlocks(codes, scales, torch.full((2, 1), 0.5), (m,), n, bits, places)


def _terms(n: int, bits: int, octaves: bool, generator: torch.Generator) -> list[TermArrays]:
    """Blocks, rows and a head of a matrix [70, n], each of two slots."""
    stored = _blocks(n, bits, octaves, generator, m=9, s=1)
    index = torch.tensor([[0, 1, 5, 17, 40, 47, 48, 60, 69], [2, 3, 4, 8, 15, 16, 31, 32, 68]])
    down = _blocks(n, bits, False, generator, m=6, s=1)
    up = _blocks(6, bits, False, generator, s=1)
    head = PackedLowRank(
        down.codes[:, 0],
        down.scales[:, 0],
        down.units,
        up.codes[:, 0],
        torch.rand((2, 6), generator=generator),
        n=n,
        bits=bits,
        make_op=TorchKernels().blockdiag,
        place_of=up.place_of,
    )
    return [_blocks(n, bits, octaves, generator), PackedRows(stored, index, 70), head]


def _look_up(blocks: PackedBlocks, random: Callable[..., Tensor]) -> Callable[[Kernels], Tensor]:
    start, ids = random(4, blocks.n), torch.tensor([0, 23, 24, 69])
    places = torch.tensor([1, 0, -1, 0])

    def run(kernels: Kernels) -> Tensor:
        y = start.clone()
        kernels.blockdiag_rows_add_(y, ids, places, blocks)
        return y

    return run


def _widened(n_rows: int, random: Callable[..., Tensor]) -> Callable[[Kernels], Tensor]:
    """A base's product whose weight consists of bfloat16 numbers, with a bias."""
    weight, x, bias = random(70, 38), random(n_rows, 38), random(70)
    rounded = weight.bfloat16().to(weight.dtype)
    return lambda kernels: kernels.linear(rounded)(x, bias)


def _product(
    terms: Sequence[TermArrays], n_rows: int, random: Callable[..., Tensor]
) -> Callable[[Kernels], Tensor]:
    """A base's product with two slots' terms in it."""
    weight, x = random(70, 38), random(n_rows, 38)
    rows = RowMapping([Segment(1, 0, 1), Segment(0, 1, n_rows)][: min(n_rows, 2)], CPU)
    present = frozenset({(0, 1), (1, 0)})

    def run(kernels: Kernels) -> Tensor:
        linear = kernels.linear(weight)
        joined = kernels.joined_terms(linear, len(weight), x.dtype) or TorchTerms(linear)
        for arrays in terms:
            joined.put(arrays, arrays, 0)
            for slot, place in present:
                joined.show(arrays, slot, place)
        return joined.product(x, rows)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
