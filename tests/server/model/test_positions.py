"""Tables of positions that a definition counts by itself are found, and told the step's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from server.model.attention import attach_store
from server.model.embedding import DeltaEmbedding
from server.model.kv_store import KVStore
from server.model.positions import counted_tables
from server.model.probe import probe, tables_counted
from server.ops.kernels import TorchKernels
from tests.models.builder import tiny_model
from tests.models.cases import Case
from tests.server.model.test_own_attention import paged_model, prepared

IDS = torch.full((1, 11), 100)


@pytest.mark.parametrize(
    ("kind", "tables", "n_passes"),
    [
        ("bart", {"model.decoder.embed_positions": 2}, 3),  # it is told no positions
        ("roberta", {"roberta.embeddings.position_embeddings": 1}, 3),  # from past the padding on
        ("gpt2", {}, 3),
        ("opt", {}, 3),  # it adds to those that it is told
        ("llama", {}, 0),  # it has no table of positions
    ],
)
def test_tables_that_count_otherwise_than_they_are_told_are_found(
    kind: str, tables: dict[str, int], n_passes: int
) -> None:
    model = tiny_model(Case(kind, kind))
    paths = {module: path for path, module in model.named_modules()}
    probed = []

    @contextmanager
    def probing() -> Iterator[None]:
        probed.append(kind)
        yield

    found = counted_tables(model, IDS, probing)
    assert {paths[table]: first for table, first in found.items()} == tables
    assert len(probed) == n_passes


def test_search_for_tables_learns_no_masks_again() -> None:
    model = paged_model(Case("gpt2", "gpt2"))
    store = KVStore(TorchKernels())
    attach_store(model, store)
    probe(model, store)
    tables_counted(model, store)
    assert store.masks
    assert all(len(masks) == 1 for masks in store.masks.values())


def test_table_that_counts_looks_up_the_positions_of_the_step() -> None:
    base = prepared("bart")
    table = base.model.get_submodule("model.decoder.embed_positions")
    assert isinstance(table, DeltaEmbedding)
    given = torch.tensor([[7, 8, 30]])
    with base.store.probing():
        base.model(input_ids=given, position_ids=given, use_cache=False)
    assert torch.equal(table(torch.zeros(1, 3)), table.weight[given + 2])
