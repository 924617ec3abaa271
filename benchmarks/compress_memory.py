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
from functools import partial
from pathlib import Path

import torch

from compressor.weights import Outgoing, write_weights

CODECS = ("blockdiag", "blockdiag+head", "impart", "impart-qt", "lowrank")
SHARD_BYTES = 600_000_000
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 8192, 128_256, 32, 8
SPREAD, CHANGE = 0.02, 0.0005  # standard deviations of the weights and of what tuning adds


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        child(*arguments.child)
        return
    print(f"{'codec':<16}{'time':>8}{'peak':>11}{'/ largest tensor':>18}{'ratio':>8}")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        base, tuned = Path(folder, "base"), Path(folder, "tuned")
        largest, total = make_pair(base, tuned, arguments.layers)
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
    from compressor.layout import read_layout
    from compressor.pipeline import Options, compress

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


def make_pair(base: Path, tuned: Path, n_layers: int) -> tuple[int, int]:
    """Write both checkpoints; return the bytes of the largest tensor and of all of them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    shapes = dict(parameter_shapes(n_layers))
    for folder, is_tuned in ((base, False), (tuned, True)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = [
            Outgoing(name, torch.bfloat16, shape, partial(weights, name, shape, is_tuned))
            for name, shape in shapes.items()
        ]
        for _ in write_weights(folder, tensors, SHARD_BYTES):
            pass
    sizes = [2 * math.prod(shape) for shape in shapes.values()]
    return max(sizes), sum(sizes)


def parameter_shapes(n_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    key_value = HIDDEN // HEADS * KV_HEADS
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (key_value, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (key_value, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


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
