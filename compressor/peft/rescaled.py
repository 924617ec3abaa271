"""Adapters that rescale rows or columns of the base: DoRA and IA3.

DoRA is a low-rank difference whose rows are then rescaled to learned lengths:
``W' = diag(m / |W + s B A|) (W + s B A)``, lengths taken row by row (one per output). With
``g = m / |W + s B A|`` the difference is ``dW = diag(g) s B A + diag(g - 1) W``: a LoRA, which is
kept exactly, and a rescaling of the base, which has full rank and is compressed like any delta,
or else stored whole. IA3 is a rescaling alone, of outputs or (feed-forward) of inputs.

Sources: Liu et al., DoRA, ICML 2024 (arXiv 2402.09353); Liu et al., IA3, NeurIPS 2022 (arXiv
2205.05638); lengths as in PEFT's `lora/dora.py`, factors as in its `ia3/layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.codecs import Params, Shape, Term
from compressor.codecs.siblings import sibling_groups
from compressor.encoders.codec import Codec, make_encoder
from compressor.encoders.sources import TensorSource
from compressor.errors import UnsupportedTensor


class RescaledParts(NamedTuple):
    """The two summands of a rescaling difference: ``dW = b^T a + rest``.

    a     float32 ``[r, n]``, the adapter's own
    b     float32 ``[r, m]``, the scaling and the row lengths in it
    rest  float32 ``[m, n]``: ``diag(g - 1) W``
    """

    a: Tensor
    b: Tensor
    rest: Tensor


def dora_parts(name: str, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> RescaledParts:
    """Split a DoRA difference; lengths are computed in float64.

    weight     float32 ``[m, n]``, the base's, ``[out, in]``
    a, b       float32 ``[r, n]`` and ``[r, m]``, the scaling in b
    magnitude  ``[m]``, the learned lengths

    Raises UnsupportedTensor naming `name` if a row has no length or the lengths do not fit.
    """
    if magnitude.shape != (weight.shape[0],):
        raise UnsupportedTensor(
            f"{name}: lora_magnitude_vector has shape {list(magnitude.shape)}, the layer "
            f"{weight.shape[0]} outputs"
        )
    length = torch.linalg.vector_norm(weight.double() + b.double().T @ a.double(), dim=1)
    gain = magnitude.double() / length
    if not bool(torch.isfinite(gain).all()):
        raise UnsupportedTensor(f"{name}: a row of the adapted weight is zero or not finite")
    rest = (weight.double() * (gain - 1).unsqueeze(1)).float()
    return RescaledParts(a, (b.double() * gain).float(), rest)


def ia3_parts(name: str, weight: Tensor, gain: Tensor) -> RescaledParts:
    """Say what IA3 adds to a weight, without factors.

    gain  ``[m, 1]`` of the outputs or ``[1, n]`` of the inputs

    Raises UnsupportedTensor naming `name` if it is neither.
    """
    m, n = weight.shape
    if gain.shape not in ((m, 1), (1, n)):
        raise UnsupportedTensor(
            f"{name}: ia3_l has shape {list(gain.shape)}, the layer {m} outputs and {n} inputs"
        )
    rest = (weight.double() * (gain.double() - 1)).float()
    return RescaledParts(torch.empty(0, n), torch.empty(0, m), rest)


@dataclass(slots=True)
class RescaleEncoder:
    """Encodes the rescaled bases of all layers with `blockdiag`, and keeps count of the error.

    Layers that read the same input get equal settings, as the server applies them together.

    ratio   bytes of a base matrix / bytes for its rescaling
    errors  by name, once encoded: relative to the whole difference of the layer
    """

    ratio: float
    seed: int
    codec: Codec
    params: Mapping[str, Params]
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, shapes: Mapping[str, Shape], itemsize: int, ratio: float, bits: int, seed: int
    ) -> RescaleEncoder:
        """Choose the settings of all layers; `itemsize` is that of the base's values."""
        codec = make_encoder("blockdiag", bits=bits)
        params: dict[str, Params] = {}
        for group in _groups(shapes):
            members = [shapes[name] for name in group]
            budget = sum(m * n for m, n in members) * itemsize / ratio
            chosen = codec.fit_siblings(members, budget)
            params |= dict(zip(group, chosen, strict=True))
        return cls(ratio, seed, codec, params)

    def encode(self, name: str, parts: RescaledParts) -> tuple[Term, ...]:
        """Encode ``parts.rest``; nothing where the gains were never trained."""
        if not bool(parts.rest.any()):
            self.errors[name] = 0.0
            return ()
        terms = self.codec.encode(name, TensorSource(parts.rest), self.params[name], self.seed)
        lost = parts.rest.clone()
        for term in terms:
            lost -= term.to_dense()
        whole = torch.linalg.vector_norm(parts.b.T @ parts.a + parts.rest, dtype=torch.float64)
        self.errors[name] = float(torch.linalg.vector_norm(lost, dtype=torch.float64) / whole)
        return terms


def _groups(shapes: Mapping[str, Shape]) -> Iterable[list[str]]:
    """Siblings of equal width together, others alone."""
    for group in sibling_groups(shapes):
        if len({shapes[name][1] for name in group}) == 1:
            yield group
        else:
            yield from ([name] for name in group)
