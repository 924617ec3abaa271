"""What is expected of one GPU, from bytes, launches and multiplications: tables for the README.

python -m benchmarks.gpu.predict    # nothing is allocated or run; needs triton, not a GPU
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu.cases import Sizes, Spec
from benchmarks.gpu.delta_cases import blockdiag_spec
from benchmarks.gpu.layer_cases import add_norm_spec, decode_spec, linear_spec, silu_spec
from benchmarks.gpu.scope import FULL
from benchmarks.gpu.shapes import LLAMA_8B, Codec, ModelShape
from benchmarks.gpu.specs import all_specs

BANDWIDTH = 4.3e12  # H200, bytes a second that a copy reaches
FLOPS = 0.5 * 989e12  # half of its bfloat16 peak, for what multiplications bind
LAUNCH_S = 2.5e-6
GEMM_SHARE = 0.85  # of the bandwidth, cuBLAS at 32 rows
LOAD_S = {32: 0.9, 128: 0.25}  # by ratio, from the request to the delta's being shown (README)
SERVED = {32: Codec(4, 8), 64: Codec(4, 16), 128: Codec(4, 32), 256: Codec(4, 64)}


def kernel_seconds(spec: Spec) -> float:
    """Launches, and the slower of memory and tensor cores."""
    moving = spec.n_bytes / (spec.share * BANDWIDTH)
    return spec.n_launches * LAUNCH_S + max(moving, spec.n_flops / FLOPS)


def step_floor_ms(shape: ModelShape, codec: Codec, rows: int, variants: int) -> float:
    """Base, deltas, keys and values of `rows` x 1024 tokens, each read once."""
    n_bytes = shape.base_bytes() + variants * shape.delta_bytes(codec)
    return (n_bytes + shape.kv_bytes(rows * FULL.context)) / BANDWIDTH * 1e3


def step_expected_ms(
    shape: ModelShape, codec: Codec, rows: int, variants: int, *, int8_base: bool = False
) -> float:
    """Every launch of a step at its expected speed, one after the other; the host hidden."""
    per_layer = [decode_spec(shape, rows, FULL.context), silu_spec(shape, rows)]
    per_layer += 2 * [add_norm_spec(shape, rows)]
    if variants:
        per_layer += [blockdiag_spec(g, codec, rows, variants) for g in shape.groups()]
    if int8_base:
        per_layer += [linear_spec(g, rows) for g in shape.groups()]
    layer = sum(kernel_seconds(spec) for spec in per_layer)
    if not int8_base:
        layer += sum(LAUNCH_S + g.base_bytes / (GEMM_SHARE * BANDWIDTH) for g in shape.groups())
    head = LAUNCH_S + shape.vocabulary().base_bytes / (GEMM_SHARE * BANDWIDTH)
    return (shape.layers * layer + head) * 1e3


def step_table() -> Iterator[str]:
    """Floor (bytes alone) and expectation, each with its base-only share."""
    ratios = (32, 128, 256)
    yield (
        "| variants | rows |"
        + "".join(f" {r}x: floor ms | expected ms |" for r in ratios)
        + "".join(f" {r}x: measured ms |" for r in ratios)
    )
    yield "|---:|---:|" + "---:|---:|" * len(ratios) + "---|" * len(ratios)
    for rows, k in FULL.mixes:
        cells = ""
        for ratio in ratios:
            for milliseconds in (step_floor_ms, step_expected_ms):
                this = milliseconds(LLAMA_8B, SERVED[ratio], rows, k)
                base = milliseconds(LLAMA_8B, SERVED[ratio], rows, 0)
                cells += f" {this:.2f} ({base / this:.2f}) |"
        yield f"| {k} | {rows} |{cells}" + " |" * len(ratios)


def kernel_table() -> Iterator[str]:
    """Of 32 rows; each kernel once, deltas of 32 variants at every setting of the benchmark."""
    yield "| kernel | MB | floor us | expected us | expected share | measured us | measured share |"
    yield "|---|---:|---:|---:|---:|---|---|"
    sizes = Sizes(FULL.batch, (FULL.batch,), FULL.context, FULL.prefill_rows)
    for spec in all_specs(LLAMA_8B, FULL.codecs, sizes):
        seconds, floor = kernel_seconds(spec), spec.n_bytes / BANDWIDTH
        yield (
            f"| {spec.name} | {spec.n_bytes / 1e6:.2f} | {floor * 1e6:.1f} | {seconds * 1e6:.1f} "
            f"| {floor / seconds:.0%} | | |"
        )


@dataclass(frozen=True)
class Card:
    """A GPU and what is not for weights, cache or deltas: context, graphs, activations."""

    total_bytes: float = 24e9
    other_bytes: float = 1.5e9


def resident_bytes(shape: ModelShape, codec: Codec) -> int:
    """Device memory of one variant: every linear, lm_head and embedding."""
    tables = 2 * shape.vocabulary().delta_bytes(codec)
    return shape.delta_bytes(codec) + tables


def memory_table(card: Card = Card()) -> Iterator[str]:
    """Variants of an 8-bit Llama-3-8B that fit beside its cache, slot arrays a quarter empty."""
    base = LLAMA_8B.resident_base_bytes_8bit()
    yield "| KV cache | left for deltas |" + "".join(f" variants, {r}x |" for r in (32, 64, 128))
    yield "|---|---:|---:|---:|---:|"
    for tokens in (16384, 32768, 65536):
        kv = LLAMA_8B.kv_bytes(tokens)
        left = card.total_bytes - card.other_bytes - base - kv
        counts = [int(left / 1.25 / resident_bytes(LLAMA_8B, SERVED[r])) for r in (32, 64, 128)]
        yield (
            f"| {tokens} tokens, {kv / 1e9:.1f} GB | {left / 1e9:.1f} GB |"
            + "".join(f" {count} |" for count in counts)
        )


def main() -> None:
    for title, table in (
        ("Decode steps", step_table()),
        ("Kernels", kernel_table()),
        ("Memory of a 24 GB card", memory_table()),
    ):
        print(f"### {title}\n")
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
