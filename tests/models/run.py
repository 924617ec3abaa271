"""Run cases of the matrix, each in a process of its own with limits of time and memory.

``python -m tests.models.run [--out FILE] [NAME ...]`` writes one JSON line a case as it ends.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from compressor.compress.options import Options
from tests.models.cases import all_cases
from tests.models.outcome import Outcome, Row, described
from tests.models.trial import CODEC, Trial

CPU_LIMIT_S = 120
TIME_LIMIT_S = 900.0  # of a machine that does other things too
MEMORY_LIMIT_BYTES = 16 << 30  # of addresses, of which torch alone maps several GiB


def run_case(name: str, *, options: Options = CODEC, kernels: tuple[str, ...] = ("torch",)) -> Row:
    """Run one case here."""
    folder = Path(tempfile.mkdtemp(prefix="impart-models-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Trial(all_cases()[name], folder, options, kernels).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_apart(
    names: Iterable[str], *, options: Options = CODEC, kernels: tuple[str, ...] = ("torch",)
) -> Iterator[Row]:
    """Run cases one after another, each in a child that is forked from this process: libraries
    are loaded once, and what one case leaves behind or breaks is its own.
    """
    context = multiprocessing.get_context("fork")
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(sender, name, options, kernels))
        child.start()
        sender.close()
        yield _received(name, child, receiver)


def _received(name: str, child: multiprocessing.process.BaseProcess, receiver: Connection) -> Row:
    row = Row(name)
    try:
        if receiver.poll(TIME_LIMIT_S):
            return Row.from_json(receiver.recv())
    except EOFError:
        child.join()
        return row.all_cells(Outcome("crash", f"the process died ({child.exitcode})"))
    finally:
        child.kill()
        child.join()
        receiver.close()
    return row.all_cells(Outcome("crash", f"it did not end within {TIME_LIMIT_S:.0f} s"))


def _child(sender: Connection, name: str, options: Options, kernels: tuple[str, ...]) -> None:
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_LIMIT_BYTES if most == resource.RLIM_INFINITY else min(most, MEMORY_LIMIT_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        row = run_case(name, options=options, kernels=kernels)
    except BaseException as error:
        row = Row(name).all_cells(Outcome("crash", described(error)))
    sender.send(row.to_json())
    sender.close()
    os._exit(0)


def read_rows(path: Path) -> list[Row]:
    """The rows of a run, the last one of every case."""
    rows = (Row.from_json(json.loads(line)) for line in path.read_text().splitlines())
    return list({row.name: row for row in rows}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases; all if none is named")
    parser.add_argument("--out", type=Path, default=Path(".cache/models.jsonl"))
    parser.add_argument("--kernels", nargs="+", default=["torch"])
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for row in run_apart(arguments.names or all_cases(), kernels=tuple(arguments.kernels)):
            out.write(json.dumps(row.to_json()) + "\n")
            out.flush()
            cells = " ".join(f"{cell}:{found.state}" for cell, found in row.cells().items())
            texts = {found.text: None for found in row.cells().values() if found.text}
            print(row.name, cells, *texts, *row.notes, sep=" | ", file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
