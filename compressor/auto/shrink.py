"""Rescale a large matrix's blocks by less than what was left out, where the model minds that less.

Keeping one of s blocks and rescaling by s has no bias, and noise s - 1 times what the matrix holds.
Rescaled by f s, the noise falls with f^2 and a part 1 - f of the difference is lost: where noise
outweighs what the matrix stands for, f = 1/2 costs less of both. For most matrices it does not:
what they lose adds up through the layers, and least-squares refits, which shrink all of them, make
the KL five times worse. It does for tied embeddings, whose blocks are many bytes that say little
(benchmarks/notes/auto.md). So only matrices that take a share of the bytes are tried, one by
one, and f = 1/2 is kept where no set of texts gets worse and the mean gains a tenth at least: a
task that no text shows may need more of the difference than they do. For the same reason f is never
less. A power of two changes no stored byte but `unit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from compressor.artifact.staging import StagedDeltas
from compressor.auto.kept import Measured, is_better
from compressor.codecs import TensorDelta
from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.partition import kept_values
from compressor.progress import Progress, within

_SHARE = 0.05  # of all codes, that a matrix has at least to be tried
_FACTOR = 0.5
_GAIN = 0.9  # of the mean KL before, at most


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The deltas, and by what the blocks of some were multiplied."""

    deltas: StagedDeltas
    found: Measured
    factors: dict[str, float]


def shrink(
    deltas: StagedDeltas,
    found: Measured,
    measure: Callable[[StagedDeltas, Progress], Measured],
    progress: Progress,
) -> Shrunk:
    """Halve the rescale of large matrices where that helps.

    found  of `deltas` as they are
    """
    best = Shrunk(deltas, found, {})
    names = _large(deltas)
    for done, name in enumerate(names):
        share = within(progress, "shrink", done / len(names), (done + 1) / len(names))
        tried = best.deltas.with_changes({name: with_rescale(best.deltas[name], _FACTOR)})
        now = measure(tried, share)
        if is_better(now, best.found, found) and now.score <= _GAIN * best.found.score:
            best = Shrunk(tried, now, best.factors | {name: _FACTOR})
    progress("shrink", len(names), len(names))
    return best


def with_rescale(delta: TensorDelta, factor: float) -> TensorDelta:
    """Return the delta with its blocks' values times `factor`, a power of two; heads stay."""
    terms = tuple(
        term.rescaled(factor) if isinstance(term, BlockDiagTerm) else term for term in delta.terms
    )
    return replace(delta, terms=terms)


def _large(deltas: Mapping[str, TensorDelta]) -> list[str]:
    """Names of those with a share of the codes, the largest first."""
    sizes = {
        name: sum(
            kept_values(t.shape, t.n_blocks) * t.bits
            for t in delta.terms
            if isinstance(t, BlockDiagTerm)
        )
        for name, delta in deltas.items()
    }
    total = sum(sizes.values())
    large = [name for name, size in sizes.items() if size and size >= _SHARE * total]
    return sorted(large, key=lambda name: (-sizes[name], name))
