"""Tables of positions whose rows a definition counts by itself.

In a packed step a row's number is not its position. Some definitions are not told positions and
count rows (BART's kin); some count otherwise than they do with those that they are told (RoBERTa's
begin past the padding). Such a table looks up the step's positions instead, from where the
definition begins of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from server.model.kv_store import KVStore

SHIFT = 3  # of the positions told, to see whether they are looked at


class StepPositions:
    """The positions of the rows of whatever forward pass runs."""

    def __init__(self, model: nn.Module) -> None:
        self._of_rows = torch.zeros(0, dtype=torch.int64)
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def of(self, module: nn.Module, n_rows: int) -> Tensor:
        """``[T]``; of the rows that the module is run on, where these are a part of the step's."""
        store = cast(KVStore, module.impart_kv_store)
        metadata = store.metadata
        first = 0 if metadata is None else metadata.first_row
        return self._of_rows[first : first + n_rows]

    def _note(self, _: nn.Module, __: object, kwargs: dict[str, Any]) -> None:
        if "position_ids" in kwargs:  # not in the pass of a copy of the model
            self._of_rows = kwargs["position_ids"][0]


class CountedPositions:
    """What a table looks up instead of what it is given: each row's position, from `first` on."""

    def __init__(self, positions: StepPositions, first: int) -> None:
        self._positions, self._first = positions, first

    def __call__(self, table: nn.Module, given: Tensor) -> Tensor:
        return (self._positions.of(table, given.numel()) + self._first).view(given.shape)


def counted_tables(
    model: PreTrainedModel, ids: Tensor, probing: Callable[[], AbstractContextManager[None]]
) -> dict[nn.Embedding, int]:
    """Tables that look up one row after the other, and not by the positions they are told as they
    do when they are told none; with what they look up first.

    ids      ``[1, T]``, all the same; T is no other size of the model
    probing  every pass runs in one of its own
    """
    of_ids = model.get_input_embeddings().weight
    tables = {
        id(module.weight): module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not of_ids
    }

    def first_rows(positions: Tensor | None) -> dict[nn.Embedding, int]:
        with probing():
            return _first_rows(model, tables, ids, positions)

    alone = first_rows(None) if tables else {}
    if not alone:  # most have rotary embeddings, and are spared the passes
        return {}
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    told, shifted = first_rows(positions), first_rows(positions + SHIFT)
    followed = {table for table, first in told.items() if shifted.get(table) == first + SHIFT}
    return {
        table: first
        for table, first in alone.items()
        if table not in followed or told[table] != first
    }


@torch.inference_mode()
def _first_rows(
    model: PreTrainedModel,
    tables: Mapping[int, nn.Embedding],
    ids: Tensor,
    positions: Tensor | None,
) -> dict[nn.Embedding, int]:
    """What each table looks up first, of those that look up one row after the other.

    tables  by the ids of their weights
    """
    noting = _Noting()
    with noting:
        told = {} if positions is None else {"position_ids": positions}
        model(input_ids=ids, use_cache=False, **told)
    found: dict[nn.Embedding, int] = {}
    for rows, weight in noting.calls:
        table = tables.get(id(weight))
        flat = rows.flatten()
        steps = torch.arange(ids.shape[1], device=flat.device)
        if table is not None and flat.shape == steps.shape and torch.equal(flat - flat[0], steps):
            found[table] = int(flat[0])
    return found


class _Noting(TorchFunctionMode):
    """Notes what is looked up, and in what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.embedding:
            self.calls.append((args[0], args[1]))
        return function(*args, **(kwargs or {}))
