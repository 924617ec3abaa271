from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.auto.survey import add_scaled, head_costs, rests_of, survey, weighted_energy
from compressor.codecs.lowrank import lowrank_from_factors
from compressor.encoders.sources import TensorSource
from compressor.encoders.svd import factors
from compressor.measure.comparison import kl_per_token
from compressor.measure.samples import Sample
from tests.compressor.codec_oracles import random_matrix


def test_head_costs_are_the_weighted_squares_of_what_the_head_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = random_matrix((60, 3), 1) @ random_matrix((3, 42), 2) + 0.1 * random_matrix((60, 42))
    weights = random_matrix((60, 42), 3).abs()
    monkeypatch.setattr("compressor.encoders.svd._STRIP", 500)  # several strips
    found = head_costs("w", TensorSource(matrix), weights, 4)
    assert found.ranks == (0, 1, 2, 3, 4, 6)
    a, b = factors("w", TensorSource(matrix), 6)
    head = lowrank_from_factors(a, b, 4)
    for rank, energy in zip(found.ranks, found.energy, strict=True):
        rest = matrix.double() - head.b[:rank].T.double() @ head.a[:rank].double()
        assert energy == pytest.approx(float((weights.double() * rest**2).sum()), rel=1e-4)
    assert weighted_energy("w", TensorSource(matrix), weights) == pytest.approx(found.energy[0])


def test_head_costs_of_a_matrix_too_small_for_heads_is_its_energy() -> None:
    found = head_costs("w", TensorSource(torch.ones(4, 5)), torch.full((4, 5), 2.0), 4)
    assert found.ranks == (0,)
    assert found.energy == (40.0,)


def test_add_scaled_adds_by_name() -> None:
    into = {"a": torch.ones(2)}
    add_scaled(into, {"a": torch.ones(2), "b": torch.full((2,), 3.0)}, 0.5)
    assert into["a"].tolist() == [1.5, 1.5]
    assert into["b"].tolist() == [1.5, 1.5]


def test_survey_fisher_predicts_the_kl_of_small_independent_noise(tiny_llama_ft: Path) -> None:
    """KL = 1/2 sum_i F_ii v_i for independent noise of variance v_i, to second order."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_ft, dtype=torch.float32).eval()
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(3, 60, (24,), generator=generator).tolist()) for _ in range(48)]
    samples = [Sample(ids, (True,) * len(ids)) for ids in rows]
    fisher = survey(model, [name], samples).fisher
    assert list(fisher) == [name]
    parameter = model.get_parameter(name)
    spread = 0.02 * float(parameter.detach().std())
    ids = torch.tensor(rows)
    with torch.no_grad():
        before = model(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
        kept, kl = parameter.clone(), []
        for _ in range(12):
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(kept + noise)
            after = model(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        parameter.copy_(kept)
    predicted = 0.5 * float(fisher[name].double().sum()) * spread**2
    assert sum(kl) / len(kl) == pytest.approx(predicted, rel=0.25)
    assert float(kl_per_token(*[before.log_softmax(-1)] * 2).abs().max()) < 1e-6


def test_survey_fisher_counts_only_counted_tokens(tiny_llama_ft: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_ft, dtype=torch.float32).eval()
    name = "model.embed_tokens.weight"
    ids = (5, 6, 7, 8)
    fisher = survey(model, [name], [Sample(ids, (False, True, False, False))]).fisher
    touched = fisher[name].sum(1).nonzero().flatten().tolist()
    assert touched == [5]  # untied: the only token that the one counted prediction has read


def test_survey_left_out_predicts_the_kl_of_leaving_a_rest_out(tiny_llama_ft: Path) -> None:
    """KL = 1/2 vec(E)^T F vec(E), along the error and not by its squares one by one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_ft, dtype=torch.float32).eval()
    name = "lm_head.weight"
    parameter = model.get_parameter(name)
    generator = torch.Generator().manual_seed(0)
    matrix = (
        0.02
        * float(parameter.detach().std())
        * (
            torch.randn(len(parameter), 1, generator=generator)
            + torch.randn(parameter.shape, generator=generator)
        )
    )
    rests = rests_of(name, TensorSource(matrix), 4)
    assert rests is not None
    rows = [tuple(torch.randint(3, 60, (24,), generator=generator).tolist()) for _ in range(48)]
    samples = [Sample(ids, (True,) * len(ids)) for ids in rows]
    found = survey(model, [name], samples, {name: rests}).left_out[name]
    ids = torch.tensor(rows)
    with torch.no_grad():
        before = model(input_ids=ids).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
        kept = parameter.clone()
        for rank, cost in zip(rests.ranks, found.tolist(), strict=True):
            parameter.copy_(kept - (matrix - rests.b[:rank].T @ rests.a[:rank]))
            after = model(input_ids=ids).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            assert kl == pytest.approx(cost / 2, rel=0.3)
        parameter.copy_(kept)


def test_rests_of_a_matrix_too_small_for_heads_is_none() -> None:
    assert rests_of("w", TensorSource(torch.ones(4, 5)), 4) is None
