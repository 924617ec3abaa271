"""ImPart with parts of it left out, as in the paper's Table 3.

Every matrix is encoded by `impart` (16-bit values) in `m n itemsize / ratio` bytes, in five ways:
whole; without pruning beforehand (beta 0); without importance (all components equally likely); with
neither; and without the rescale by 1/q. All at equal bytes; the fine-tune's norms are kept exactly.

Example: ``python -m benchmarks.ablation --base BASE --finetuned FT --task intent
--data test.csv --items 100 --ratio 32 --seeds 2``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.evaluate import Reference, Score, task_samples, text_samples
from benchmarks.tasks import TASKS, load_items
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import TensorPair, is_unchanged, pair_tensors
from compressor.codecs import MatrixSource, Term
from compressor.codecs.impart_sampling import (
    FIXED_POINT,
    Allocation,
    Floats,
    kept_before_shift,
    solve_allocation,
    to_fixed_point,
)
from compressor.encoders.impart import ImpartCodec, encode_drawn
from compressor.encoders.svd import spectrum, tall
from compressor.measure.texts import load_texts
from compressor.usable_cpus import product_threads


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table."""

    name: str
    prune: bool = True
    importance: bool = True
    rescale: bool = True


VARIANTS = (
    Variant("ImPart"),
    Variant("no pre-pruning", prune=False),
    Variant("no importance", importance=False),
    Variant("neither", prune=False, importance=False),
    Variant("no rescale", rescale=False),
)

Terms = dict[str, Term]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one variant and seed came to."""

    kl_task: float
    kl_text: float
    agreement: float
    score: Score


def allocate(variant: Variant, sigma: Floats, kept: int, beta: float, c: float) -> Allocation:
    """The variant's inclusion probabilities, summing to `kept`."""
    beta = beta if variant.prune else 0.0
    if variant.importance:
        return solve_allocation(sigma, kept, beta, c)
    rank = kept_before_shift(len(sigma), beta)
    equal = np.full(rank, kept / rank)
    return Allocation(1 - kept / len(sigma), to_fixed_point(equal, kept, FIXED_POINT))


def encode_variants(
    name: str, source: MatrixSource, codec: ImpartCodec, budget_bytes: float, seeds: int
) -> Iterator[tuple[Variant, int, Term]]:
    """Encode one matrix in every way, from one decomposition."""
    parts = spectrum(name, tall(source)[0])
    kept = codec.fit(source.shape, budget_bytes)["kept"]
    for variant in VARIANTS:
        allocation = allocate(variant, parts.sigma.numpy(), kept, codec.beta, codec.C)
        for seed in range(seeds):
            yield (
                variant,
                seed,
                encode_drawn(
                    name,
                    source,
                    parts,
                    allocation,
                    codec.block_rows,
                    seed,
                    {},
                    rescale=variant.rescale,
                ),
            )


def encode_all(args: argparse.Namespace) -> dict[tuple[Variant, int], Terms]:
    """Terms of every matrix that the fine-tune changed, by variant and seed."""
    codec = ImpartCodec(beta=args.beta, C=args.c)
    found: dict[tuple[Variant, int], Terms] = {
        (variant, seed): {} for variant in VARIANTS for seed in range(args.seeds)
    }
    with Checkpoint(args.base) as base, Checkpoint(args.finetuned) as tuned:
        pairs = [p for p in pair_tensors(base, tuned).pairs if p.is_matrix]
        for done, pair in enumerate(pairs):
            print(f"\rencoding {done + 1}/{len(pairs)}", end="", file=sys.stderr, flush=True)
            if is_unchanged(base, tuned, pair):
                continue
            budget = _tuned_bytes(tuned, pair) / args.ratio
            source = DeltaSource(base, tuned, pair)
            for variant, seed, term in encode_variants(
                pair.name, source, codec, budget, args.seeds
            ):
                found[variant, seed][pair.name] = term
    print(file=sys.stderr)
    return found


def _tuned_bytes(tuned: Checkpoint, pair: TensorPair) -> int:
    m, n = pair.base_shape
    return m * n * tuned.dtype(pair.tuned_key).itemsize


class Measuring:
    """The fine-tune's predictions, and one model whose matrices each variant overwrites."""

    def __init__(self, args: argparse.Namespace) -> None:
        tokenizer = AutoTokenizer.from_pretrained(args.finetuned)
        self.model = _load(args.finetuned)
        items = load_items(args.task, args.data, args.items)
        self.task = Reference(self.model, task_samples(tokenizer, items))
        texts = load_texts(None, args.texts)
        self.text = Reference(self.model, text_samples(tokenizer, texts, args.text_tokens))
        self.finetuned = _score(self.task.correct)
        self._base = dict(_load(args.base).named_parameters())

    def variant(self, terms: Terms) -> Measured:
        """Put ``base + terms`` into the model; what is no matrix stays the fine-tune's."""
        with torch.no_grad():
            for name, term in terms.items():
                self.model.get_parameter(name).copy_(self._base[name] + term.to_dense())
        task, text = self.task.distance(self.model), self.text.distance(self.model)
        return Measured(task.kl, text.kl, task.agreement, _score(task.correct))


def _load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _score(correct: Sequence[bool]) -> Score:
    return Score(fmean(correct), len(correct))


def markdown(rows: dict[Variant, list[Measured]], finetuned: Score) -> str:
    """The table; KL and score are means over seeds."""
    lines = [
        "| | KL task | KL text | agreement | score | seeds |",
        "|---|---:|---:|---:|---:|---:|",
        f"| fine-tune | 0 | 0 | 1.000 | {_mean([finetuned])} | |",
    ]
    for variant, group in rows.items():
        cells = [
            variant.name,
            f"{fmean(m.kl_task for m in group):.4f}",
            f"{fmean(m.kl_text for m in group):.4f}",
            f"{fmean(m.agreement for m in group):.3f}",
            _mean([m.score for m in group]),
            str(len(group)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(scores: Sequence[Score]) -> str:
    return f"{fmean(s.mean for s in scores):.3f} ± {fmean(s.standard_error for s in scores):.3f}"


def run(args: argparse.Namespace) -> str:
    """Encode, measure, and return the table."""
    measuring = Measuring(args)
    rows: dict[Variant, list[Measured]] = {}
    for (variant, seed), terms in encode_all(args).items():
        measured = measuring.variant(terms)
        print(f"{variant.name}, seed {seed}: {measured}", file=sys.stderr, flush=True)
        rows.setdefault(variant, []).append(measured)
    return markdown(rows, measuring.finetuned)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="Hugging Face directory")
    add("--finetuned", type=Path, required=True, help="same shapes as the base")
    add("--task", choices=sorted(TASKS), required=True)
    add("--data", type=Path, required=True, help="test file of the task")
    add("--items", type=int, default=100, help="test items drawn")
    add("--texts", type=int, default=32, help="of the built-in general texts, for a second KL")
    add("--text-tokens", type=int, default=32, help="tokens of each")
    add("--ratio", type=float, default=32.0, help="bytes of a matrix / bytes of its term")
    add("--beta", type=float, default=0.6)
    add("--c", type=float, default=1.0)
    add("--seeds", type=int, default=1, help="seeds 0 ... n - 1")
    add("--threads", type=int, help="CPU threads; default: as the server's")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = parse_args(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(product_threads(args.threads).count)
    print(run(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
