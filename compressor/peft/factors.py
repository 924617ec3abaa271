"""What each kind of adapter multiplies: the two factors of ``dW = b^T a``, float32, scaling in b.

With module factors as PEFT stores them (its ``tuners/*/layer.py``), each ``dW [out, in]``:

    LoRA     s B A                       A [r, in], B [out, r]; of an Embedding (B A)^T
    AdaLoRA  s B (A * E) / (r + 1e-5)    E [r, 1]; r is the initial rank, whatever is left of it
    VeRA     (l_b * B) (l_d * A)         A, B shared by all modules and cut to the module's size
    LoHa     s (W1a W1b) * (W2a W2b)     elementwise: the products of all pairs of components, r^2
    LoKr     s W1 (x) W2                 Kronecker; each a matrix or a product: ranks multiply

PiSSA and OLoRA begin with a product of the base's own (its largest singular components; the first
columns of its QR factors), which PEFT takes out of the base when it loads the adapter: the
difference is the product now less the product then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.codecs import Shape

Parts = Mapping[str, Tensor]


class Factors(NamedTuple):
    """``a [k, in]`` and ``b [k, out]``, without the scaling; `rank` is what the scaling goes by,
    None if that is in the settings alone.
    """

    a: Tensor
    b: Tensor
    rank: int | None


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


def lokr_factors(parts: Parts, _: Shape) -> Factors:
    """``(L1 R1) (x) (L2 R2) = (L1 (x) L2) (R1 (x) R2)``."""
    left1, right1, rank1 = _lokr_side(parts, "lokr_w1")
    left2, right2, rank2 = _lokr_side(parts, "lokr_w2")
    return Factors(torch.kron(right1, right2), torch.kron(left1, left2).T, rank1 or rank2)


def _lokr_side(parts: Parts, name: str) -> tuple[Tensor, Tensor, int | None]:
    """Two factors of W1 or W2, and their rank if they are stored so."""
    if name not in parts:
        left, right = parts[f"{name}_a"], parts[f"{name}_b"]
        return left, right, len(right)
    whole = parts[name]
    m, n = whole.shape
    return (torch.eye(m), whole, None) if m <= n else (whole, torch.eye(n), None)


def initial_factors(start: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the ``a`` and ``b`` that PEFT takes out of a weight ``[out, in]``, scaling in b.

    start  ``pissa``: the product does not depend on the scaling; or ``olora``
    """
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], scaling * q[:, :rank].T
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root.unsqueeze(1) * v[:rank], (u[:, :rank] * root).T


# The parts of one module that make a pair of factors.
FACTORS: dict[frozenset[str], Callable[[Parts, Shape], Factors]] = {
    frozenset({"A", "B"}): lora_factors,
    frozenset({"embedding_A", "embedding_B"}): embedding_factors,
    frozenset({"A", "B", "E"}): adalora_factors,
    frozenset({"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"}): vera_factors,
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}): loha_factors,
    frozenset({"lokr_w1", "lokr_w2"}): lokr_factors,
    frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}): lokr_factors,
    frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}): lokr_factors,
    frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}): lokr_factors,
}
SHARED = ("vera_A", "vera_B")
