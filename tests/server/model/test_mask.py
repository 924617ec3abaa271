"""Forms of masks, against transformers' own mask functions and a count of every pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from server.errors import ConfigError
from server.model.mask import CAUSAL, HandedMask, MaskForm, MaskFunction, form_of

CPU = torch.device("cpu")
NO_PADDING = torch.zeros(1, dtype=torch.int64)


def form(function: MaskFunction, n_positions: int) -> MaskForm:
    return form_of(HandedMask(function, CPU), n_positions)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 500, 8192])
def test_windows_and_chunks_of_transformers_are_recognised(size: int) -> None:
    window = masking_utils.sliding_window_causal_mask_function(size)
    assert form(window, 20_000) == MaskForm(window=size)
    chunk = masking_utils.chunked_causal_mask_function(size, NO_PADDING)
    # A chunk of one token is a window of one token.
    assert form(chunk, 20_000) == (MaskForm(chunk=size) if size > 1 else MaskForm(window=1))


@pytest.mark.parametrize("size", [100, 101, 5000])
def test_window_or_chunk_that_no_sequence_reaches_is_causal(size: int) -> None:
    for function in (
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(size),
        masking_utils.chunked_causal_mask_function(size, NO_PADDING),
    ):
        assert form(function, 100) == CAUSAL


def test_first_seen_agrees_with_transformers_masks_for_every_pair() -> None:
    queries = torch.arange(40)
    for size in (1, 3, 7, 39):
        for function, ours in (
            (masking_utils.sliding_window_causal_mask_function(size), MaskForm(window=size)),
            (masking_utils.chunked_causal_mask_function(size, NO_PADDING), MaskForm(chunk=size)),
        ):
            for q, k in itertools.product(queries, queries):
                seen = bool(function(NO_PADDING[0], NO_PADDING[0], q, k))
                assert seen == (ours.first_seen(int(q)) <= int(k) <= int(q))


def bidirectional_window(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() < 16


def dilated(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (((q - k) % 4 == 0) | (q - k < 4))


def sink_and_window(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((q - k < 64) | (k < 4))


def late_window(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((q - k < 600) | (q < 900))


def blind_in_the_middle(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ~((q == 17) & (k == 9))


@pytest.mark.parametrize(
    "function",
    [dilated, sink_and_window, late_window, blind_in_the_middle],
    ids=lambda f: f.__name__,
)
def test_mask_of_another_form_is_refused(function: MaskFunction) -> None:
    with pytest.raises(ConfigError, match="a mask that is of an unknown form; the server knows"):
        form(function, 2048)


@pytest.mark.parametrize(
    "function", [masking_utils.bidirectional_mask_function, bidirectional_window]
)
def test_mask_that_looks_ahead_is_refused(function: MaskFunction) -> None:
    with pytest.raises(ConfigError, match="not causal: tokens see later ones"):
        form(function, 2048)


def test_mask_that_reads_the_batch_is_refused_in_a_sentence() -> None:
    blocks = torch.tensor([[0, 0, 1, 1]])  # of a batch of four tokens
    function = masking_utils.blockwise_overlay(blocks)
    with pytest.raises(ConfigError, match="depends on more than positions"):
        form(function, 2048)
