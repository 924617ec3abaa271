"""What an encoder is, and how to make one by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from compressor.codecs.term import MatrixSource, Params, Shape, Term
from compressor.encoders.blockdiag import BlockDiagCodec
from compressor.encoders.impart import ImpartCodec
from compressor.encoders.impart_qt import ImpartQtCodec
from compressor.encoders.lowrank import LowRankCodec
from compressor.errors import InputError


class Codec(Protocol):
    """One way to encode a matrix within a byte budget."""

    @property
    def name(self) -> str:
        """Name in artifacts and on the command line."""
        ...

    def options(self) -> Params:
        """Resolved options, JSON-able; `make_encoder(name, **options)` gives the same codec."""
        ...

    @property
    def joins_siblings(self) -> bool:
        """Whether matrices that read the same input should be fitted together."""
        ...

    def fit_siblings(self, shapes: Sequence[Shape], budget_bytes: float) -> tuple[Params, ...]:
        """Return a setting for each of `shapes`, of equal width; as `fit` for a single one.

        The settings agree in what a server needs to apply the matrices in one product.
        """
        ...

    def fit(self, shape: Shape, budget_bytes: float) -> Params:
        """Return the setting whose size is nearest `budget_bytes`; it may exceed it a little.

        JSON-able and complete: with the seed it determines what `encode` does.
        """
        ...

    def probes(self, shape: Shape) -> tuple[Params, ...]:
        """Return settings for a matrix of `shape` that give every kind of term this codec can."""
        ...

    def terms_of(self, params: Params) -> tuple[str, ...]:
        """Return the codecs of the terms that `encode` returns for `params`, in order."""
        ...

    def size_bytes(self, shape: Shape, params: Params) -> int:
        """Exact bytes of all `tensors()` of all terms that `encode` returns for `params`."""
        ...

    def encode(
        self, name: str, source: MatrixSource, params: Params, seed: int
    ) -> tuple[Term, ...]:
        """Encode one matrix; same name, source, params and seed give identical bytes.

        Raises UnsupportedTensor naming `name` if the source holds NaN or infinity.
        """
        ...


@runtime_checkable
class CalibratedCodec(Protocol):
    """A codec that can use what its layers are applied to."""

    @property
    def wants_inputs(self) -> bool:
        """Whether sources should be `WithInputs` where that is possible."""
        ...


def wants_inputs(codec: Codec) -> bool:
    """Return whether `codec` asks for its layers' inputs."""
    return isinstance(codec, CalibratedCodec) and codec.wants_inputs


def make_encoder(codec: str, **options: Any) -> Codec:
    """Return the codec named `codec`. An unknown name, option or value raises InputError."""
    made_by: dict[str, Callable[..., Codec]] = {
        "blockdiag": BlockDiagCodec,
        "impart": ImpartCodec,
        "impart-qt": ImpartQtCodec,
        "lowrank": LowRankCodec,
    }
    if codec not in made_by:
        raise InputError(f"unknown codec {codec!r}; choose from {', '.join(made_by)}")
    known = list(inspect.signature(made_by[codec]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(
            f"codec {codec} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    try:
        return made_by[codec](**options)
    except TypeError as error:  # a value that cannot even be compared
        raise InputError(f"codec {codec}: unusable option value: {error}") from error
