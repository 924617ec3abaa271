"""What compression costs in quality, on a real base and a real full fine-tune.

For every method, ratio and seed: compress, restore into one model in memory, compare with the
fine-tune: KL per token on gold answers and on text it never saw, top-1 agreement, exact-match
score, flips. The fine-tune itself in the variants' dtype and the base are the controls. Rows go to
OUT.csv as they come; those already there are not measured again. `benchmarks.quality_report` turns
it into a table and a plot, which this does at the end too.

Example: ``python -m benchmarks.quality --base BASE --finetuned FT --name intent --task intent
--data test.csv --out benchmarks/results/intent``
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.baselines import BASELINES
from benchmarks.evaluate import Reference, Score, task_samples, text_samples
from benchmarks.methods import PRESETS, Method, Pair, Variant, make_method
from benchmarks.quality_report import write_report
from benchmarks.quality_rows import Row, RowFile
from benchmarks.svd_cache import cached_spectra
from benchmarks.tasks import TASKS, load_items, reference_paragraphs, write_calibration
from compressor.errors import BudgetError, ImpartError
from compressor.measure.texts import read_texts
from compressor.usable_cpus import product_threads

RATIOS = (32.0, 128.0, 64.0, 256.0, 16.0, 512.0)  # the most telling first
_SHOWN_ITEMS = 200


class Bench:
    """The pair, its texts, and one model whose weights are overwritten for each variant."""

    def __init__(self, args: argparse.Namespace, pair: Pair) -> None:
        self.args, self.pair = args, pair
        self.dtype = getattr(torch, args.dtype)
        tokenizer = AutoTokenizer.from_pretrained(args.finetuned)
        items = task_samples(tokenizer, load_items(args.task, args.data, args.items))
        texts = read_texts(args.text, args.texts) if args.text else reference_paragraphs(args.texts)
        finetuned = self._load(args.finetuned, torch.float32)
        self.on_task = Reference(finetuned, items)
        self.on_text = Reference(finetuned, text_samples(tokenizer, texts, args.text_tokens))
        self.variant = Variant(args.base, self.dtype)
        self.blank = Row(
            pair=args.name,
            dtype=args.dtype,
            n_items=len(items),
            n_tokens=self.on_task.n_tokens,
            n_text_tokens=self.on_text.n_tokens,
            threads=torch.get_num_threads(),
        )

    def _load(self, path: Path, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def control(self, method: str) -> Row:
        """Measure the fine-tune or the base itself."""
        path = self.args.finetuned if method == "fine-tune" else self.args.base
        ratio = 1.0 if method == "fine-tune" else math.inf
        row = replace(self.blank, method=method, ratio_asked=ratio, ratio_true=ratio)
        return self.measure(self._load(path, self.dtype), row)

    def cell(self, name: str, method: Method, ratio: float, seed: int) -> Row:
        """Compress, restore and measure one variant."""
        row = replace(self.blank, method=name, ratio_asked=ratio, seed=seed)
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            size = method.install(self.variant, self.pair, ratio, seed)
        except BudgetError as error:
            return replace(row, note=str(error))
        seconds = time.perf_counter() - start
        row = replace(row, n_bytes=size.n_bytes, ratio_true=size.ratio, compress_s=seconds)
        row = self.measure(self.variant.model, row)
        return replace(row, cpu_s=time.process_time() - cpu_start)

    def measure(self, model: PreTrainedModel, row: Row) -> Row:
        """Return `row` with everything measured on `model` filled in."""
        start = time.perf_counter()
        task, text = self.on_task.distance(model), self.on_text.distance(model)
        score = Score(fmean(task.correct), len(task.correct))
        pairs = zip(task.correct, self.on_task.correct, strict=True)
        return replace(
            row,
            kl_task=task.kl,
            kl_text=text.kl,
            agreement=task.agreement,
            agreement_text=text.agreement,
            score=score.mean,
            score_se=score.standard_error,
            flips=fmean(ours != theirs for ours, theirs in pairs),
            correct="".join(str(int(one)) for one in task.correct),
            measure_s=time.perf_counter() - start,
        )


def cells(
    args: argparse.Namespace, methods: Mapping[str, Method]
) -> Iterator[tuple[str, Method, float, int]]:
    """Yield what to measure: the first seed of everything, then the other draws."""
    for name, method in methods.items():
        if method.fixed_ratio is not None:
            yield name, method, method.fixed_ratio, 0
    for seed in range(args.seeds):
        for ratio in args.ratios:
            for name, method in methods.items():
                if method.fixed_ratio is None and (seed == 0 or method.draws):
                    yield name, method, ratio, seed


def run(args: argparse.Namespace, methods: Mapping[str, Method], file: RowFile) -> None:
    """Measure what `file` does not hold yet."""
    todo = [cell for cell in cells(args, methods) if (cell[0], *cell[2:]) not in file]
    controls = [name for name in ("fine-tune", "base") if not file.has_method(name)]
    if not (todo or controls):
        return
    with Pair(args.base, args.finetuned) as pair:
        bench = Bench(args, pair)
        file.check(bench.blank)
        for name in controls:
            file.add(_report(bench.control(name)))
        for name, method, ratio, seed in todo:
            if seed > 0 and file.is_refused(name, ratio):
                continue
            file.add(_report(bench.cell(name, method, ratio, seed)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="Hugging Face directory")
    add("--finetuned", type=Path, required=True, help="Hugging Face directory")
    add("--name", required=True, help="name of the pair in the output")
    add("--task", choices=sorted(TASKS), required=True)
    add("--data", type=Path, required=True, help="test file of the task")
    add("--items", type=int, default=100, help="test items drawn")
    text = "text the fine-tune never saw (.jsonl with field text, or lines); default: Python's docs"
    add("--text", type=Path, help=text)
    add("--texts", type=int, default=24, help="how many of them")
    add("--text-tokens", type=int, default=48, help="tokens of each")
    add("--ratios", type=float, nargs="+", default=list(RATIOS))
    known = [*PRESETS, *BASELINES]
    methods = f"{', '.join(known)}, auto, auto-task, or any codec as codec:option=value,..."
    add("--methods", nargs="+", default=known, metavar="METHOD", help=methods)
    add("--train", type=Path, help="training file of the task: what auto-task is shown")
    add("--seeds", type=int, default=3, help="seeds 0 ... n - 1 of methods that draw")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the variants")
    add("--threads", type=int, help="CPU threads; default: as the server's")
    add("--svd-cache", type=Path, help="folder that keeps decompositions from run to run")
    add("--out", type=Path, required=True, help="writes OUT.csv, OUT.md and OUT.svg")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Rows are written as they come: an interrupted run keeps what it measured."""
    args = parse_args(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(product_threads(args.threads).count)
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="quality-")))
            shown = _shown(args, folder)
            methods = {name: make_method(name, shown) for name in args.methods}
            stack.enter_context(cached_spectra(args.svd_cache))
            run(args, methods, stack.enter_context(RowFile(args.out.with_suffix(".csv"))))
    except ImpartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write_report(args.out.with_suffix(".csv")))
    return 0


def _shown(args: argparse.Namespace, folder: Path) -> Path | None:
    """Write what `auto-task` may see of the task into `folder`."""
    if args.train is None:
        return None
    items = load_items(args.task, args.train, _SHOWN_ITEMS)
    return write_calibration(items, folder / "task.jsonl")


def _report(row: Row) -> Row:
    what = f"{row.pair} {row.method} x{row.ratio_asked:g} seed {row.seed}"
    found = f"KL {row.kl_task:.5f} / {row.kl_text:.5f}, score {row.score:.3f}"
    seconds = f"{row.compress_s:.0f} + {row.measure_s:.0f} s, {row.cpu_s:.0f} s of CPU"
    print(f"{what}: {row.note or f'{found}, {seconds}'}", file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
