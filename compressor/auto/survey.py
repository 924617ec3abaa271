"""How much a model minds errors in each weight, and what heads of each rank would leave.

To second order the KL per token that an error ``E`` causes is ``1/2 vec(E)^T F vec(E)`` with F the
Fisher information of the fine-tune's own predictions. Noise of independent sign sees its diagonal,
which is the mean square of the gradient of ``log p(y)`` for tokens y drawn from those predictions
(Kunstner et al. 2019, arXiv 1905.12558: drawn, not given by the text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.auto.allocate import HeadCosts, possible_ranks
from compressor.codecs.lowrank import LowRankTerm, lowrank_from_factors
from compressor.codecs.term import MatrixSource
from compressor.encoders.sources import finite_block
from compressor.encoders.svd import factors, row_strips
from compressor.measure.samples import Sample
from compressor.progress import Progress, counted, silent


@dataclass(frozen=True, slots=True, eq=False)
class Rests:
    """One matrix ``dW [m, n]`` and its longest head, to tell what each rank's head leaves.

    ranks   of heads, ascending
    whole   float32 ``[m, n]``
    a, b    float32 ``[R, n]`` and ``[R, m]``: ``head_r = b[:r]^T a[:r]``
    """

    ranks: tuple[int, ...]
    whole: Tensor
    a: Tensor
    b: Tensor

    def squares(self, gradient: Tensor) -> Tensor:
        """``<gradient, dW - head_r>^2`` of every rank, float64, on the CPU: gradient ``[>= m, n]``.

        What an error costs to second order, summed over samples: the gradients of a sample's tokens
        are independent and of mean 0, as each token was drawn from the model's own prediction.
        """
        own = gradient[: self.whole.shape[0]].float()
        along = (self.b * (own @ self.a.T).T).sum(1, dtype=torch.float64).cumsum(0)
        of_heads = torch.cat([along.new_zeros(1), along])[list(self.ranks)]
        whole = torch.mul(own, self.whole).sum(dtype=torch.float64)
        return (whole - of_heads).square().cpu()


@dataclass(frozen=True, slots=True)
class Survey:
    """By parameter, a predicted token each.

    fisher    diagonal of the Fisher information, float32, shaped as the parameter
    left_out  of those with `Rests`, twice the KL of leaving each out, float64
    """

    fisher: dict[str, Tensor]
    left_out: dict[str, Tensor]


def survey(
    model: Any,
    names: Sequence[str],
    samples: Sequence[Sample],
    rests: Mapping[str, Rests] | None = None,
    progress: Progress = silent,
    seed: int = 0,
) -> Survey:
    """Take the gradients of some samples.

    model    a Hugging Face causal language model; its gradients are cleared
    names    of the parameters wanted
    samples  one backward pass each; only counted tokens contribute
    rests    of some of `names`, in the parameter's orientation, on the model's device
    """
    rests = rests or {}
    left_out = {
        name: torch.zeros(len(rest.ranks), dtype=torch.float64) for name, rest in rests.items()
    }
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in set(names)}
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in wanted.items()}
    generator = torch.Generator().manual_seed(seed)
    n_tokens = 0
    for sample in counted(progress, "gradients", samples, lambda sample: len(sample.ids)):
        ids = torch.tensor([sample.ids], device=model.device)
        wanted_rows = torch.tensor(sample.counted[1:])
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            logp = logits[wanted_rows.to(logits.device)].float().log_softmax(-1)
            drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator)
            loss = logp.gather(1, drawn.to(logp.device)).sum()
            gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                found[name].addcmul_(gradient.float(), gradient.float())
                if name in rests:
                    left_out[name] += rests[name].squares(gradient)
        n_tokens += len(drawn)
    return Survey(
        {name: total.div_(max(1, n_tokens)).cpu() for name, total in found.items()},
        {name: total.div_(max(1, n_tokens)) for name, total in left_out.items()},
    )


def rests_of(name: str, source: MatrixSource, head_bits: int) -> Rests | None:
    """Return what heads of the possible ranks leave; None if the matrix is too small for any."""
    m, n = source.shape
    ranks = possible_ranks(source.shape)
    head = _head(name, source, ranks[-1], head_bits)
    if head is None:
        return None
    whole = torch.cat([finite_block(name, source, *rows, 0, n) for rows in row_strips(m, n)])
    return Rests(ranks, whole, head.a.to(whole.device), head.b.to(whole.device))


def head_costs(name: str, source: MatrixSource, weights: Tensor, head_bits: int) -> HeadCosts:
    """Return what heads of the possible ranks leave of a matrix, weighted elementwise.

    weights  float32 ``[m, n]`` >= 0, as the source's matrix
    """
    m, n = source.shape
    ranks = possible_ranks(source.shape)
    head = _head(name, source, ranks[-1], head_bits)
    energy = torch.zeros(len(ranks), dtype=torch.float64)
    for start, end in row_strips(m, n):
        rest = finite_block(name, source, start, end, 0, n).cpu()
        part = weights[start:end]
        before = 0
        for index, rank in enumerate(ranks):
            if head is not None and rank:
                rest.addmm_(head.b[before:rank, start:end].T, head.a[before:rank], alpha=-1)
                before = rank
            energy[index] += torch.mul(part, rest).mul_(rest).sum(dtype=torch.float64)
    return HeadCosts(ranks, tuple(energy.tolist()))


def weighted_energy(name: str, source: MatrixSource, weights: Tensor) -> float:
    """Return ``sum_ij weights_ij dW_ij^2``."""
    m, n = source.shape
    total = 0.0
    for start, end in row_strips(m, n):
        part = finite_block(name, source, start, end, 0, n).cpu()
        total += float(torch.mul(weights[start:end], part).mul_(part).sum(dtype=torch.float64))
    return total


def add_scaled(into: dict[str, Tensor], more: Mapping[str, Tensor], scale: float) -> None:
    """``into += scale * more``, name by name."""
    for name, values in more.items():
        if name in into:
            into[name].add_(values, alpha=scale)
        else:
            into[name] = values * scale


def _head(name: str, source: MatrixSource, rank: int, bits: int) -> LowRankTerm | None:
    if not rank:
        return None
    a, b = factors(name, source, rank)
    return lowrank_from_factors(a, b, bits)
