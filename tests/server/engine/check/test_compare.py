"""Where two runs part, on numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from server.engine.check.compare import (
    CEILING,
    Bounds,
    first_parting,
    floor_of,
    measured_bounds,
    worst,
)
from server.engine.check.steps import Rows


def rows(**changed: Tensor) -> Rows:
    points = {name: torch.ones(4, 8) for name in ("a", "b")}
    logits = {3: torch.ones(5), 4: torch.ones(5)}
    points |= {name: value for name, value in changed.items() if name != "logits"}
    return Rows(points, logits | ({4: changed["logits"]} if "logits" in changed else {}))


def test_equal_runs_do_not_part() -> None:
    assert first_parting(rows(), rows(), Bounds(1e-9)) is None
    assert worst(rows(), rows(), Bounds(1e-9)) == 0.0


def test_first_place_in_the_definitions_order_is_named_by_its_worst_row() -> None:
    off = torch.ones(4, 8)
    off[2] *= 1.25
    parting = first_parting(rows(b=off, logits=torch.zeros(5)), rows(), Bounds(1e-3))
    assert parting is not None
    assert (parting.place, parting.error) == ("the values after b", pytest.approx(0.25))
    assert worst(rows(b=off, logits=torch.zeros(5)), rows(), Bounds(1e-9)) == pytest.approx(1.0)


def test_logits_alone_are_named() -> None:
    parting = first_parting(rows(logits=2 * torch.ones(5)), rows(), Bounds(1e-3))
    assert parting is not None
    assert str(parting).startswith("the logits differ from those of transformers' own definition")


def test_added_tokens_are_not_compared() -> None:
    longer = Rows(rows().points, {3: torch.ones(7), 4: torch.ones(7)})
    assert first_parting(rows(), longer, Bounds(0.0)) is None


def test_what_is_not_finite_does_not_agree() -> None:
    off = torch.ones(4, 8)
    off[0, 0] = math.nan
    parting = first_parting(rows(a=off), rows(), Bounds(1e9))
    assert parting is not None
    assert parting.place == "the values after a"


def test_place_with_other_rows_is_passed_over() -> None:
    assert first_parting(rows(a=torch.zeros(2, 8)), rows(), Bounds(1e-9)) is None


def test_allowed_grows_with_the_rounding_of_a_dtype() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    floors = [floor_of(dtype, cpu) for dtype in dtypes]
    assert floors == sorted(floors)
    assert floor_of(torch.float32, cuda) > floor_of(torch.float32, cpu)


def test_measured_noise_widens_the_bound_where_it_was_and_never_past_the_ceiling() -> None:
    noisy = rows(b=1.01 * torch.ones(4, 8), logits=3 * torch.ones(5))
    bounds = measured_bounds(0.001, [noisy], [rows()])
    assert bounds.at("the values after a") == 0.001
    assert bounds.at("the values after b") == pytest.approx(0.08)
    assert bounds.at("the logits") == bounds.largest == CEILING


def test_share_of_outliers_may_be_farther_off() -> None:
    off = torch.ones(4, 8)
    off[2] *= 3
    assert first_parting(rows(a=off), rows(), Bounds(1e-3)) is not None
    assert first_parting(rows(a=off), rows(), Bounds(1e-3, outliers=0.25)) is None
    off[1] *= 3
    assert first_parting(rows(a=off), rows(), Bounds(1e-3, outliers=0.25)) is not None
