"""Layers that count rows get each row's position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.model.row_positions import RowPositions, count_by_positions


def test_row_and_length_before_it_are_the_position() -> None:
    positions = torch.tensor([[7, 0, 1, 2, 40]])
    told = RowPositions(positions)
    assert torch.equal(torch.arange(5) + told.get_seq_length(1), positions[0])
    keys, values = torch.randn(2, 1, 2, 5, 4)
    assert told.update(keys, values, 1) == (keys, values)


class Attention(nn.Module):
    def __init__(self, tuned: bool) -> None:
        super().__init__()
        self.attn_temperature_tuning = tuned


class Layer(nn.Module):
    def __init__(self, tuned: bool) -> None:
        super().__init__()
        self.self_attn = Attention(tuned)

    def forward(
        self, x: Tensor, position_ids: Tensor, past_key_values: RowPositions | None = None
    ) -> Tensor | None:
        return None if past_key_values is None else past_key_values.get_seq_length()


def test_only_layers_that_count_rows_are_told() -> None:
    layers = nn.ModuleList([Layer(True), Layer(False)])
    assert count_by_positions(layers) == 1
    x, positions = torch.zeros(1, 2, 4), torch.tensor([[5, 9]])
    told, other = (layer(x, position_ids=positions) for layer in layers)
    assert told.tolist() == [5, 8]
    assert other is None
