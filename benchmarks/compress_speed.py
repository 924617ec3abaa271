"""Time and peak memory of each codec on the matrices of an 8B model, one at a time.

    python -m benchmarks.compress_speed [--codec blockdiag ...] [--threads 1] [--ratio 32]

Makes one layer and the embedding of a Llama-3-8B-shaped base (bf16) and a fine-tune of it in a
temporary directory. Each shape and codec runs in a fresh process: read the difference, plan,
encode, and measure the error, as `impart compress` does. CPU time is of the process and all its
threads: on a busy machine it says more than the clock. The last rows add up all matrices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.compress_memory import Sizes, make_pair, peak_rss_bytes

LAYERS = 32
SIZES = Sizes(layers=1, hidden=4096, intermediate=14336)
# Codec: its name, and options.
CODECS = {
    "blockdiag": ("blockdiag", {}),
    "blockdiag+head": ("blockdiag", {"head_fraction": 0.25}),
    "impart-qt": ("impart-qt", {}),
}
# One matrix of each shape, and how many of its shape the whole model has.
MATRICES = {
    "model.layers.0.self_attn.q_proj.weight": 2 * LAYERS,
    "model.layers.0.self_attn.k_proj.weight": 2 * LAYERS,
    "model.layers.0.mlp.gate_proj.weight": 2 * LAYERS,
    "model.layers.0.mlp.down_proj.weight": LAYERS,
    "model.embed_tokens.weight": 2,  # and lm_head
}


def main() -> None:
    options = parse_arguments()
    if options.child:
        child(*options.child, options.ratio, options.threads)
        return
    print("| codec | matrix | CPU time | clock | peak memory | peak / matrix in bf16 |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        base, tuned = Path(folder, "base"), Path(folder, "tuned")
        make_pair(base, tuned, SIZES)
        for codec in options.codec or CODECS:
            measure(codec, base, tuned, options)


def measure(codec: str, base: Path, tuned: Path, options: argparse.Namespace) -> None:
    """Print the rows of one codec."""
    cpu_s, clock_s, peak_bytes = 0.0, 0.0, 0
    for name, count in MATRICES.items():
        command = [sys.executable, "-m", "benchmarks.compress_speed", "--ratio", str(options.ratio)]
        command += [
            "--threads",
            str(options.threads),
            "--child",
            codec,
            name,
            str(base),
            str(tuned),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        m, n = found["shape"]
        show(codec, f"{m} x {n}", found["cpu_s"], found["clock_s"], found["peak_bytes"], 2 * m * n)
        cpu_s += count * found["cpu_s"]
        clock_s += count * found["clock_s"]
        peak_bytes = max(peak_bytes, found["peak_bytes"])
    n_matrices = sum(MATRICES.values())
    show(codec, f"all {n_matrices}, extrapolated", cpu_s, clock_s, peak_bytes, None)


def show(
    codec: str, what: str, cpu_s: float, clock_s: float, peak_bytes: int, n_bytes: int | None
) -> None:
    relative = "" if n_bytes is None else f"{peak_bytes / n_bytes:.2f}"
    cells = [codec, what, f"{cpu_s:.1f} s", f"{clock_s:.1f} s", f"{peak_bytes / 1e6:.0f} MB"]
    print(f"| {' | '.join(cells)} | {relative} |", flush=True)


def child(codec: str, name: str, base: str, tuned: str, ratio: float, threads: int) -> None:
    """Encode one matrix and print what it took, above what the imports take."""
    from compressor.checkpoint.difference import DeltaSource
    from compressor.checkpoint.files import Checkpoint
    from compressor.checkpoint.pairing import pair_tensors
    from compressor.compress.pipeline import relative_error
    from compressor.encoders.codec import make_encoder

    torch.set_num_threads(threads)
    kind, codec_options = CODECS[codec]
    encoder = make_encoder(kind, **codec_options)
    with Checkpoint(base) as ours, Checkpoint(tuned) as theirs:
        pair = next(pair for pair in pair_tensors(ours, theirs).pairs if pair.name == name)
        before, cpu, clock = peak_rss_bytes(), time.process_time(), time.perf_counter()
        source = DeltaSource(ours, theirs, pair)
        m, n = source.shape
        params = encoder.fit((m, n), 2 * m * n / ratio)
        terms = encoder.encode(name, source, params, 0)
        relative_error(terms, source)
    found = {
        "shape": [m, n],
        "cpu_s": time.process_time() - cpu,
        "clock_s": time.perf_counter() - clock,
        "peak_bytes": peak_rss_bytes() - before,
    }
    print(json.dumps(found))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--codec", action="append", choices=CODECS, help="default: all")
    parser.add_argument("--ratio", type=float, default=32.0, help="of each matrix' bytes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dir", default=None, help="where the checkpoints go for the while")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
