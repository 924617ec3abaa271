"""Few rows through a small model take no helpers, many weights take all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from server.ops.alone import SMALL_BYTES, alone_if_small


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("n_bytes", "n_threads"), [(SMALL_BYTES, 1), (SMALL_BYTES + 1, 2)])
def test_helpers_are_left_out_of_small_work_and_come_back(n_bytes: int, n_threads: int) -> None:
    with alone_if_small(n_bytes):
        assert torch.get_num_threads() == n_threads
    assert torch.get_num_threads() == 2
