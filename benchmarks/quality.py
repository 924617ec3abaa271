"""What compression costs in quality, on a real base and a real full fine-tune.

For every codec setting, ratio and seed: build the artifact, merge it into the base, compare with
the fine-tune: KL per token on gold answers, on prompts and (if given) on generic text, top-1
agreement, exact-match score. The fine-tune and the base are measured as controls.

Example: ``python -m benchmarks.quality --base BASE --finetuned FT --name intent --task intent
--data test.csv --items 400 --seeds 3 --out results/intent``
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.evaluate import Reference, Score, exact_match, task_samples, text_samples
from benchmarks.tasks import TASKS, load_items
from compressor.artifact import read_artifact
from compressor.errors import BudgetError
from compressor.fidelity import read_texts
from compressor.pipeline import Options, compress

# Name on the command line -> codec and its options.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "blockdiag-2": ("blockdiag", {"bits": 2}),
    "blockdiag-4": ("blockdiag", {"bits": 4}),
    "blockdiag-2-head": ("blockdiag", {"bits": 2, "head_fraction": 0.25}),
    "blockdiag-4-head": ("blockdiag", {"bits": 4, "head_fraction": 0.25}),
    "impart": ("impart", {}),
    "impart-qt": ("impart-qt", {}),
    "lowrank": ("lowrank", {"bits": 16}),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measured model; the fields are the columns of the CSV file."""

    name: str
    setting: str
    ratio_asked: float
    seed: int
    ratio_true: float = math.nan
    n_bytes: int = 0
    compress_s: float = math.nan
    kl_answer: float = math.nan
    kl_prompt: float = math.nan
    kl_text: float = math.nan
    agreement: float = math.nan
    score: float = math.nan
    score_se: float = math.nan
    note: str = ""


class Bench:
    """The pair, its texts, and one model whose weights are overwritten for each variant."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(args.finetuned)
        self.items = load_items(args.task, args.data, args.items)
        finetuned = self._load(args.finetuned)
        self.on_task = Reference(finetuned, task_samples(self.tokenizer, self.items))
        self.on_text = self._text_reference(finetuned)
        self.seen: set[str] = set()
        self.control = self.measure(finetuned, Row(args.name, "fine-tune", 1, 0, ratio_true=1.0))

    def _load(self, path: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).eval()

    def _text_reference(self, finetuned: PreTrainedModel) -> Reference | None:
        if self.args.text is None:
            return None
        texts = read_texts(self.args.text, self.args.texts)
        return Reference(finetuned, text_samples(self.tokenizer, texts, self.args.text_tokens))

    def base_row(self) -> Row:
        """Measure the base itself."""
        return self.measure(self._load(self.args.base), Row(self.args.name, "base", math.inf, 0))

    def variant_row(self, setting: str, ratio: float, seed: int) -> Row | None:
        """Compress, merge and measure one variant; None if another seed gave the same tensors."""
        row = Row(self.args.name, setting, ratio, seed)
        codec, codec_options = SETTINGS[setting]
        options = Options(codec=codec, codec_options=codec_options, ratio=ratio, seed=seed)
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            out = Path(folder) / "delta"
            start = time.perf_counter()
            try:
                summary = compress(self.args.base, self.args.finetuned, out, options)
            except BudgetError as error:
                return replace(row, note=str(error))
            seconds = time.perf_counter() - start
            with (out / "delta.safetensors").open("rb") as file:
                drawn = hashlib.file_digest(file, "sha256").hexdigest()
            if drawn in self.seen:
                return None
            self.seen.add(drawn)
            model = self._load(self.args.base)
            merge(model, out)
        row = replace(row, ratio_true=summary.ratio, n_bytes=summary.n_bytes, compress_s=seconds)
        return self.measure(model, row)

    def measure(self, model: PreTrainedModel, row: Row) -> Row:
        """Return `row` with everything measured on `model` filled in."""
        distance = self.on_task.distance(model)
        score = (
            exact_match(model, self.tokenizer, self.items)
            if self.args.score
            else Score(math.nan, len(self.items))
        )
        return replace(
            row,
            kl_answer=distance.kl_answer,
            kl_prompt=distance.kl_prompt,
            agreement=distance.agreement,
            kl_text=self.on_text.distance(model).kl_answer if self.on_text else math.nan,
            score=score.mean,
            score_se=score.standard_error if self.args.score else math.nan,
        )


def merge(model: PreTrainedModel, artifact_dir: Path) -> None:
    """Add the deltas of an artifact to a base model in memory."""
    artifact = read_artifact(artifact_dir)
    rows = model.get_input_embeddings().weight.shape[0]
    grown = max((t.shape[0] for t in artifact.tensors if t.base_shape[:1] == (rows,)), default=rows)
    if grown > rows:
        model.resize_token_embeddings(grown, mean_resizing=False)
    with torch.no_grad():
        for tensor in artifact.tensors:
            parameter = model.get_parameter(tensor.name)
            oriented = parameter.T if tensor.transposed else parameter
            base_rows = tensor.base_shape[0]
            oriented.copy_(tensor.merge(oriented[:base_rows].float()))


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Yield each row as soon as it is measured."""
    bench = Bench(args)
    yield bench.control
    yield bench.base_row()
    for ratio in args.ratios:
        for setting in args.settings:
            for seed in range(args.seeds):
                row = bench.variant_row(setting, ratio, seed)
                if row is None or row.note:
                    if row is not None:
                        yield row
                    break
                yield row


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table, seeds averaged; the range of KL over seeds in brackets."""
    has_text = any(not math.isnan(row.kl_text) for row in rows)
    heading = ["codec", "asked", "true ratio", "MB", "KL answer", "KL prompt"]
    heading += [*(["KL text"] if has_text else []), "agreement", "score", "seeds"]
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.setting, row.ratio_asked), []).append(row)
    for (setting, asked), group in groups.items():
        if note := next((row.note for row in group if row.note), ""):
            lines.append(f"| {setting} | {asked:g} | {note} |" + " |" * (len(heading) - 3))
            continue
        control = group[0].n_bytes == 0
        cells = [setting, *(["", "", ""] if control else _sizes(asked, group))]
        cells += [_range([row.kl_answer for row in group]), _mean(group, "kl_prompt", ".4f")]
        cells += [_mean(group, "kl_text", ".4f")] if has_text else []
        cells += [_mean(group, "agreement", ".3f")]
        cells += [f"{_mean(group, 'score', '.3f')} ± {_mean(group, 'score_se', '.3f')}"]
        lines.append("| " + " | ".join([*cells, str(len(group))]) + " |")
    return "\n".join(lines)


def _sizes(asked: float, group: Sequence[Row]) -> list[str]:
    n_bytes = fmean(row.n_bytes for row in group)
    return [f"{asked:g}", _mean(group, "ratio_true", ".2f"), f"{n_bytes / 1e6:.2f}"]


def _mean(group: Sequence[Row], field: str, form: str) -> str:
    return format(fmean(getattr(row, field) for row in group), form)


def _range(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.4f}, {max(values):.4f}]"


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
    add("--items", type=int, default=400, help="test items drawn")
    add("--text", type=Path, help="generic text (.jsonl with field text, or lines) for a third KL")
    add("--texts", type=int, default=100, help="how many of them")
    add("--text-tokens", type=int, default=128, help="tokens of each")
    add("--ratios", type=float, nargs="+", default=[32.0, 64.0])
    add("--settings", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS))
    add("--seeds", type=int, default=3, help="seeds 0 ... n - 1 of each setting")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--no-score", dest="score", action="store_false", help="KL only: no generation")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--out", type=Path, required=True, help="writes OUT.csv and OUT.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Rows are written as they come: an interrupted run keeps what it measured."""
    args = parse_args(argv)
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in run(args):
            rows.append(row)
            writer.writerow(asdict(row))
            file.flush()
            print(_progress(row), file=sys.stderr, flush=True)
            args.out.with_suffix(".md").write_text(markdown(rows) + "\n")
    print(markdown(rows))
    return 0


def _progress(row: Row) -> str:
    what = f"{row.setting} x{row.ratio_asked:g} seed {row.seed}"
    return f"{what}: {row.note or f'KL {row.kl_answer:.4f}, score {row.score:.3f}'}"


if __name__ == "__main__":
    sys.exit(main())
