"""One tensor from the checkpoints to the staging folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from compressor.artifact.staging import StagedTensor, Staging
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import CHUNK_ELEMENTS, TensorPair, whole_value
from compressor.codecs import DenseRows, MatrixSource, TensorDelta, Term
from compressor.encoders.codec import Codec
from compressor.encoders.sources import WithInputs
from compressor.errors import CheckpointError, UnsupportedTensor
from compressor.measure.moments import LazyMoments


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes tensors of one pair of checkpoints, each setting of each once.

    seed    of the codecs' draws
    device  where to compute
    inputs  what the layers are applied to, for codecs that want it
    """

    base: Checkpoint
    tuned: Checkpoint
    staging: Staging
    seed: int
    device: str
    inputs: LazyMoments | None

    def stage(self, pair: TensorPair, codec: Codec) -> StagedTensor:
        """Return the tensor encoded with its settings; encode it unless that was done before."""
        key = json.dumps([pair.name, codec.name, pair.params])
        staged = self.staging.find(key)
        if staged is not None:
            return staged
        source = self._source(pair) if pair.params is not None else None
        terms: tuple[Term, ...] = ()
        if pair.params is not None and source is not None:
            terms = codec.encode(pair.name, source, pair.params, self.seed)
        error = relative_error(terms, source) if source is not None else None
        delta = TensorDelta(
            name=pair.name,
            shape=pair.shape,
            base_shape=pair.base_shape,
            transposed=pair.transposed,
            terms=terms,
            exact=self._exact_rows(pair),
        )
        return self.staging.add(key, delta, error)

    def stage_changed(self, delta: TensorDelta, pair: TensorPair) -> StagedTensor:
        """Stage what became of a tensor after it was encoded."""
        error = relative_error(delta.terms, self._source(pair)) if delta.terms else None
        return self.staging.add(f"{pair.name} in the end", delta, error)

    def _source(self, pair: TensorPair) -> MatrixSource:
        source = DeltaSource(self.base, self.tuned, pair, self.device)
        hessian = None if self.inputs is None else self.inputs.get(pair.name)
        if hessian is not None and pair.scales is not None and pair.scales.columns is not None:
            by = pair.scales.columns  # as much as the weights grow, the inputs shrink
            hessian = hessian / (by.unsqueeze(1) * by)
        return source if hessian is None else WithInputs(source, hessian)

    def _exact_rows(self, pair: TensorPair) -> DenseRows | None:
        if pair.exact_start is None:
            return None
        if pair.is_matrix:
            values = self.tuned.read_rows(pair.tuned_key, pair.exact_start)
            if pair.scales is not None and len(values):
                raise UnsupportedTensor(
                    f"{pair.name}: the base was quantised with scales of its own, which added rows "
                    "have none of; compress without --difference-from"
                )
        else:
            values = whole_value(self.tuned, pair.tuned_key, pair)
            values = values if pair.scales is None else pair.scales.of_vector(values)
        rows = DenseRows(pair.exact_start, values)
        if not bool(torch.isfinite(rows.values).all()):
            raise CheckpointError(
                f"{pair.name}: NaN or infinity in {self.tuned.name}; save it again"
            )
        return rows


def relative_error(terms: Iterable[Term], source: MatrixSource) -> float:
    """Return ``|dW_hat - dW| / |dW|`` (Frobenius), a few MiB of rows at a time."""
    m, n = source.shape
    terms = tuple(terms)
    step = max(1, CHUNK_ELEMENTS // n)
    wanted = off = 0.0
    for start in range(0, m, step):
        end = min(start + step, m)
        part = source.block(start, end, 0, n).cpu()
        wanted += _square_sum(part)
        for term in terms:
            rows = torch.arange(start, end)
            part -= term.to_dense() if end - start == m else term.dense_rows(rows)
        off += _square_sum(part)
    if not math.isfinite(wanted):
        raise CheckpointError("NaN or infinity in the base or the fine-tune; save it again")
    return math.sqrt(off / wanted) if wanted else 0.0


def _square_sum(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
