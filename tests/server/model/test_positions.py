"""Tables of positions that a definition counts by itself are found, and told the step's."""

from __future__ import annotations

import pytest
import torch

from server.model.embedding import DeltaEmbedding
from server.model.positions import counted_tables
from tests.models.builder import tiny_model
from tests.models.cases import Case
from tests.server.model.test_text_only import prepared

IDS = torch.full((1, 11), 100)


def found(kind: str) -> dict[str, int]:
    model = tiny_model(Case(kind, kind))
    paths = {module: path for path, module in model.named_modules()}
    return {paths[table]: first for table, first in counted_tables(model, IDS).items()}


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("bart", {"model.decoder.embed_positions": 2}),  # it is told no positions
        ("roberta", {"roberta.embeddings.position_embeddings": 1}),  # it begins past the padding
        ("gpt2", {}),
        ("opt", {}),  # it adds to those that it is told
        ("llama", {}),
    ],
)
def test_tables_that_count_otherwise_than_they_are_told_are_found(
    kind: str, tables: dict[str, int]
) -> None:
    assert found(kind) == tables


def test_table_that_counts_looks_up_the_positions_of_the_step() -> None:
    base, _ = prepared("bart")
    table = base.model.get_submodule("model.decoder.embed_positions")
    assert isinstance(table, DeltaEmbedding)
    given = torch.tensor([[7, 8, 30]])
    with base.store.probing():
        base.model(input_ids=given, position_ids=given, use_cache=False)
    assert torch.equal(table(torch.zeros(1, 3)), table.weight[given + 2])
