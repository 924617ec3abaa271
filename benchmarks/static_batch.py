"""Baseline: transformers `generate` on one static batch, the same shape of load without a server.

    python -m benchmarks.static_batch --model DIR [--batch 32] [--prompt-tokens 64]

All requests start and end together and nothing is served: an upper bound for what a server without
kernels of its own can do on this machine, to be run beside `benchmarks.serve`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Print output tokens/s: median and range over the repeats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, args.prompt_tokens)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    rates = []
    for repeat in range(args.repeats + 1):
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=args.max_tokens,
            max_new_tokens=args.max_tokens,
        )
        if repeat:  # the first one warms up
            rates.append(args.batch * args.max_tokens / (time.perf_counter() - start))
    print(f"{statistics.median(rates):.0f} tok/s ({min(rates):.0f} to {max(rates):.0f})")


if __name__ == "__main__":
    main()
