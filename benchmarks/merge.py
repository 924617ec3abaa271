"""What `impart merge` keeps of each task: task arithmetic and TIES, without and with masks.

Merges the fine-tunes of all tasks into one model for each method and mask, and measures on each
task KL to its own fine-tune and the exact-match score, as `benchmarks.quality` does. The base and
the fine-tunes themselves are the controls. Rows go to OUT as they come; those already there are
not measured again.

Example: ``python -m benchmarks.merge --base BASE --task intent=FT,test.csv --task
slots=FT2,test.json --out benchmarks/results/merge.csv``
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.evaluate import Reference, Score, task_samples
from benchmarks.svd_cache import cached_spectra
from benchmarks.tasks import TASKS, load_items
from compressor.merge.config import MergeConfig, MergeModel, constant
from compressor.merge.merge import merge

METHODS = ("ta", "ties")
MASKS = ("none", "dare", "impart")


@dataclass(frozen=True, slots=True)
class Row:
    """One merged model, or a control, on one task. A control has no mask."""

    model: str
    mask: str
    task: str
    kl: float
    score: float
    score_se: float
    n_items: int
    weights: str
    mask_density: float


@dataclass(frozen=True, slots=True)
class Task:
    """A fine-tune, its test items and what it says about them."""

    name: str
    finetuned: Path
    reference: Reference


def read_tasks(options: argparse.Namespace) -> list[Task]:
    tasks = []
    for entry in options.task:
        name, _, paths = entry.partition("=")
        finetuned, data = (Path(part) for part in paths.split(","))
        samples = task_samples(
            AutoTokenizer.from_pretrained(finetuned), load_items(name, data, options.items)
        )
        tasks.append(Task(name, finetuned, Reference(load(finetuned), samples)))
    return tasks


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def measure(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    label: tuple[str, str],
    options: argparse.Namespace,
) -> Iterator[Row]:
    """Yield a row for each task."""
    for task in tasks:
        found = task.reference.distance(model)
        score = Score(fmean(found.correct), len(found.correct))
        yield Row(
            *label, task.name, found.kl, score.mean, score.standard_error, score.n,
            weights_text(options), options.mask_density,
        )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Measure what the file does not hold yet."""
    check_weights(options)
    weights = weights_text(options)
    rows = read_rows(options.out)
    known = {(r["model"], r["mask"]) for r in rows if not r["mask"] or r["weights"] == weights}
    labels = [("base", ""), *((Path(t.partition("=")[0]).name, "") for t in options.task)]
    labels += [(method, mask) for mask in MASKS for method in METHODS]
    todo = [label for label in labels if label not in known]
    tasks = read_tasks(options) if todo else []
    controls = {"base": options.base} | {task.name: task.finetuned for task in tasks}
    for label in todo:
        if label[0] in controls:
            rows = list(measure(load(controls[label[0]]), tasks, label, options))
        else:
            rows = list(merged(options, tasks, label))
        append_rows(options.out, rows)
        for row in rows:
            print(
                f"{row.model} {row.mask} {row.task}: KL {row.kl:.4f}, {row.score:.3f}", flush=True
            )


def merged(
    options: argparse.Namespace, tasks: Sequence[Task], label: tuple[str, str]
) -> Iterator[Row]:
    """Merge, load and measure."""
    method, mask = label
    masked = {} if mask == "none" else {"mask_density": constant(options.mask_density)}
    models = tuple(
        MergeModel(str(task.finetuned), weight=constant(weight), **masked)
        for task, weight in zip(tasks, options.weight, strict=True)
    )
    config = MergeConfig(
        str(options.base),
        models,
        method=method,
        mask=mask,
    )
    with tempfile.TemporaryDirectory(prefix="merge-") as folder:
        merge(config, Path(folder) / "model", overwrite=False)
        yield from measure(load(Path(folder) / "model"), tasks, label, options)


def check_weights(options: argparse.Namespace) -> None:
    """Fill in weights of 1, and refuse any other number of them than of tasks."""
    options.weight = options.weight or [1.0] * len(options.task)
    if len(options.weight) != len(options.task):
        raise SystemExit(f"--weight: give one for each of the {len(options.task)} tasks")


def weights_text(options: argparse.Namespace) -> str:
    return " : ".join(f"{weight:g}" for weight in options.weight)


def read_rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append_rows(file: Path, rows: Sequence[Row]) -> None:
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v
                             for k, v in asdict(row).items()})  # fmt: skip


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """The table: a line for each model, score and KL for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        "| model | mask | weights | " + " | ".join(f"{t}: score | {t}: KL" for t in tasks) + " |"
    ]
    lines.append("|---|---|---|" + "---:|---:|" * len(tasks))
    keys = {(row["model"], row["mask"], row["weights"] if row["mask"] else ""): 0 for row in rows}
    for key in keys:
        cells = [*key]
        for row in rows:
            if (row["model"], row["mask"], row["weights"] if row["mask"] else "") == key:
                score, error = float(row["score"]), float(row["score_se"])
                cells += [f"{score:.2f} ± {error:.2f}", f"{float(row['kl']):.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="Hugging Face directory")
    add(
        "--task", action="append", required=True, metavar="NAME=FT,DATA", help=f"of {sorted(TASKS)}"
    )
    add("--items", type=int, default=50, help="test items drawn of each")
    add("--weight", type=float, nargs="+", help="of each task's fine-tune; default: 1")
    add("--mask-density", type=float, default=0.3, help="share that dare and impart keep")
    add("--svd-cache", type=Path, help="folder that keeps decompositions from run to run")
    add("--out", type=Path, required=True, help="CSV file; rows are added to it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_args(argv)
    transformers_logging.disable_progress_bar()
    with cached_spectra(options.svd_cache):
        run(options)
    print(markdown(read_rows(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
