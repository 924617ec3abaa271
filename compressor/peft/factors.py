"""What each kind of adapter multiplies: the two factors of ``dW = b^T a``, float32, scaling in b.

With module factors as PEFT stores them (its ``tuners/*/layer.py``), each ``dW [out, in]``:

    LoRA     s B A                       A [r, in], B [out, r]; of an Embedding (B A)^T
    AdaLoRA  s B (A * E) / (r + 1e-5)    E [r, 1]; r is the initial rank, whatever is left of it
    VeRA     (l_b * B) (l_d * A)         A, B shared by all modules and cut to the module's size
    LoHa     s (W1a W1b) * (W2a W2b)     elementwise: the products of all pairs of components, r^2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from compressor.codecs import Shape

Parts = Mapping[str, Tensor]


class Factors(NamedTuple):
    """``a [k, in]`` and ``b [k, out]``, without the scaling; `rank` is what the scaling goes by."""

    a: Tensor
    b: Tensor
    rank: int


def lora_factors(parts: Parts, _: Shape) -> Factors:
    """Of a linear layer."""
    return Factors(parts["A"], parts["B"].T, len(parts["A"]))


def embedding_factors(parts: Parts, _: Shape) -> Factors:
    """Of an embedding ``[vocabulary, width]``."""
    return Factors(parts["embedding_B"].T, parts["embedding_A"], parts["embedding_B"].shape[1])


def adalora_factors(parts: Parts, _: Shape) -> Factors:
    """Each component has a weight of its own, E."""
    return Factors(parts["A"] * parts["E"], parts["B"].T, len(parts["A"]))


def vera_factors(parts: Parts, shape: Shape) -> Factors:
    """Shared projections, scaled by the module's own vectors."""
    m, n = shape
    a = parts["vera_lambda_d"].unsqueeze(1) * parts["vera_A"][:, :n]
    b = parts["vera_lambda_b"] * parts["vera_B"][:m].T
    return Factors(a, b, len(a))


def loha_factors(parts: Parts, _: Shape) -> Factors:
    """Row ``i r + j`` pairs component i of the first product with j of the second."""
    first, second = parts["hada_w1_b"], parts["hada_w2_b"]
    a = (first.unsqueeze(1) * second.unsqueeze(0)).flatten(0, 1)
    left, right = parts["hada_w1_a"].T, parts["hada_w2_a"].T
    b = (left.unsqueeze(1) * right.unsqueeze(0)).flatten(0, 1)
    return Factors(a, b, len(first))


# The parts of one module that make a pair of factors.
FACTORS: dict[frozenset[str], Callable[[Parts, Shape], Factors]] = {
    frozenset({"A", "B"}): lora_factors,
    frozenset({"embedding_A", "embedding_B"}): embedding_factors,
    frozenset({"A", "B", "E"}): adalora_factors,
    frozenset({"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"}): vera_factors,
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}): loha_factors,
}
SHARED = ("vera_A", "vera_B")
