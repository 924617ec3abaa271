"""Experts that one checkpoint stores together and another one by one: which rows are which.

transformers joins the matrices of a layer's experts into one tensor on loading and takes it apart
on saving, by rules of its own for each architecture. Here the rules are given the numbers of the
rows in place of the rows; what comes out says where each row goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.checkpoint.headers import slice_name
from compressor.checkpoint.layout import Layout, empty_model
from compressor.checkpoint.stored_form import saved_tensors

if TYPE_CHECKING:
    from torch.nn import Module

    from compressor.checkpoint.files import Checkpoint, Piece


@dataclass(frozen=True, slots=True)
class PartRows:
    """Rows ``start .. end`` of one expert's matrix in a tensor of all."""

    expert: int
    start: int
    end: int


def expert_parts(model: Module, name: str, n_experts: int, n_rows: int) -> dict[str, PartRows]:
    """Say what is stored in place of the 3-D parameter `name`, by the names that transformers
    gives; empty if it stores the parameter as it is, or does more to it than to share out rows.
    """
    import torch

    numbers = torch.arange(n_experts * n_rows).reshape(n_experts, n_rows, 1)
    found = {}
    for part, rows in saved_tensors(model, {name: numbers}).items():
        if rows.ndim != 2 or rows.shape[1] != 1 or not len(rows):
            return {}
        first, last = int(rows[0]), int(rows[-1])
        is_run = torch.equal(rows[:, 0], torch.arange(first, first + len(rows)))
        if not is_run or first // n_rows != last // n_rows:
            return {}
        found[part] = PartRows(first // n_rows, first % n_rows, last % n_rows + 1)
    return found


def keys_in_form(
    base: Checkpoint, layout: Layout, tuned: Checkpoint, theirs: Layout, keys: Mapping[str, str]
) -> dict[str, str]:
    """Names of the fine-tune's tensors by the parameters of the base's `layout`.

    Where one stores experts together and the other one by one, the fine-tune's are given names as
    in the base (`Checkpoint.compose`). What cannot be brought together stays as it is.

    keys  by the fine-tune's own parameters
    """
    together = [name for name in theirs.stacked if slice_name(name, 0) not in layout.parameters]
    apart = [name for name in layout.stacked if slice_name(name, 0) not in theirs.parameters]
    if not together and not apart:
        return dict(keys)
    found, model = dict(keys), empty_model(base.path)
    for name in together:
        _take_apart(model, name, theirs.stacked[name], tuned, found)
    for name in apart:
        _put_together(model, name, layout, tuned, found)
    return found


def _take_apart(
    model: Module, name: str, n_experts: int, tuned: Checkpoint, found: dict[str, str]
) -> None:
    """Give the parts of a stored 3-D tensor names of their own, in place of its matrices'."""
    wholes = [found[slice_name(name, expert)] for expert in range(n_experts)]
    n_rows = tuned.tensors[wholes[0]].shape[0]
    for part, rows in expert_parts(model, name, n_experts, n_rows).items():
        found.pop(slice_name(name, rows.expert), None)
        tuned.compose(part, [(wholes[rows.expert], rows.start, rows.end)])
        found[part] = part


def _put_together(
    model: Module, name: str, layout: Layout, tuned: Checkpoint, found: dict[str, str]
) -> None:
    """Make the matrices of a 3-D tensor out of the parts that are stored."""
    n_experts, matrix = layout.stacked[name], layout.parameters[slice_name(name, 0)]
    n_rows = matrix.shape[1 if matrix.transposed else 0]
    parts = expert_parts(model, name, n_experts, n_rows)
    if not parts.keys() <= found.keys():
        return
    pieces: dict[str, list[Piece]] = {}
    for part, rows in sorted(parts.items(), key=lambda item: item[1].start):
        piece = (found.pop(part), 0, rows.end - rows.start)
        pieces.setdefault(slice_name(name, rows.expert), []).append(piece)
    for whole, own in pieces.items():
        tuned.compose(whole, own)
        found[whole] = whole
