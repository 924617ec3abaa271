"""Peak memory of `impart compress` on a synthetic sharded checkpoint of more than 1 GB.

    python -m benchmarks.compress_memory [--codec blockdiag --codec impart ...] [--ratio 32]

Makes a Llama-shaped base (128,256 x 2,048 tied embedding, bf16) and a fine-tune of it in a
temporary directory, compresses it with each codec in a fresh process, and prints the time, the
peak resident memory above what the imports alone take, and its ratio to the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from compressor.checkpoint.writer import Outgoing, write_weights

CODECS = ("blockdiag", "blockdiag+head", "impart", "impart-qt", "lowrank")
SHARD_BYTES = 600_000_000
SPREAD, CHANGE = 0.02, 0.0005  # standard deviations of the weights and of what tuning adds


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Llama with tied embeddings."""

    layers: int
    hidden: int = 2048
    intermediate: int = 8192
    vocabulary: int = 128_256
    heads: int = 32
    kv_heads: int = 8


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        child(*arguments.child)
        return
    print(f"{'codec':<16}{'time':>8}{'peak':>11}{'/ largest tensor':>18}{'ratio':>8}")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        base, tuned = Path(folder, "base"), Path(folder, "tuned")
        largest, total = make_pair(base, tuned, Sizes(arguments.layers))
        print(f"# checkpoint {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, bf16")
        for codec in arguments.codec or CODECS:
            out = Path(folder, f"out-{codec}")
            command = [sys.executable, "-m", "benchmarks.compress_memory", "--child"]
            command += [codec, str(base), str(tuned), str(out), str(arguments.ratio)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            above = found["peak_bytes"] - found["imports_bytes"]
            print(
                f"{codec:<16}{found['seconds']:>7.0f}s{above / 1e6:>8.0f} MB"
                f"{above / largest:>17.2f}x{found['ratio']:>8.2f}",
                flush=True,
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", action="append", choices=CODECS, help="default: all")
    parser.add_argument("--ratio", type=float, default=32.0)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--dir", default=None, help="where the checkpoints go for the while")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(codec: str, base: str, tuned: str, out: str, ratio: str) -> None:
    """Compress once and print what it took; runs in a process of its own."""
    from compressor.checkpoint.layout import read_layout
    from compressor.compress.options import Options
    from compressor.compress.pipeline import compress

    read_layout(Path(base))  # imports the architecture, as every run must
    imports = peak_rss_bytes()
    name, _, head = codec.partition("+")
    options = Options(
        codec=name, ratio=float(ratio), codec_options={"head_fraction": 0.25} if head else {}
    )
    start = time.perf_counter()
    summary = compress(base, tuned, out, options)
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "imports_bytes": imports, "ratio": summary.ratio}
    print(json.dumps(result | {"peak_bytes": peak_rss_bytes()}))


def peak_rss_bytes() -> int:
    """Most resident memory of this program so far.

    Not getrusage: its maximum survives exec, so a child would report its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10
    )


def make_pair(base: Path, tuned: Path, sizes: Sizes) -> tuple[int, int]:
    """Write both checkpoints; return the bytes of the largest tensor and of all of them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    shapes = dict(parameter_shapes(sizes))
    for folder, is_tuned in ((base, False), (tuned, True)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = [
            Outgoing(name, torch.bfloat16, shape, partial(weights, name, shape, is_tuned))
            for name, shape in shapes.items()
        ]
        for _ in write_weights(folder, tensors, SHARD_BYTES):
            pass
    n_bytes = [2 * math.prod(shape) for shape in shapes.values()]
    return max(n_bytes), sum(n_bytes)


def parameter_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = sizes.hidden, sizes.intermediate
    yield "model.embed_tokens.weight", (sizes.vocabulary, width)
    key_value = width // sizes.heads * sizes.kv_heads
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (width, width)
        yield prefix + "self_attn.k_proj.weight", (key_value, width)
        yield prefix + "self_attn.v_proj.weight", (key_value, width)
        yield prefix + "self_attn.o_proj.weight", (width, width)
        yield prefix + "mlp.gate_proj.weight", (inner, width)
        yield prefix + "mlp.up_proj.weight", (inner, width)
        yield prefix + "mlp.down_proj.weight", (width, inner)
        yield prefix + "input_layernorm.weight", (width,)
        yield prefix + "post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)


def weights(name: str, shape: tuple[int, ...], is_tuned: bool) -> torch.Tensor:
    """Gaussian base weights; the fine-tune adds a smaller Gaussian. Seeded by name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator).mul_(SPREAD).to(torch.bfloat16)
    if is_tuned:
        change = torch.randn(shape, generator=generator).mul_(CHANGE)
        values = change.add_(values).to(torch.bfloat16)
    return values


if __name__ == "__main__":
    main()
