"""Bytes of an artifact before it exists: everything but the encoded values, by serialising it.

What a codec's parts are called and how its parameters look is learned from encoding one small
matrix; the rest is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from compressor.artifact.card import model_card
from compressor.artifact.config import DeltaConfig, TensorEntry, TermEntry, dump_config
from compressor.codecs import Params, Shape, Term
from compressor.encoders.codec import Codec
from compressor.encoders.sources import TensorSource

_PROBE_SHAPE: Shape = (64, 64)
_SUM_LINE = 64 + 2 + 1  # digest, two spaces, newline
_LISTED = ("delta.safetensors", "delta_config.json")
_USUAL_ERROR = 5.4321  # what an error's digits look like before it is known
_METADATA = '"__metadata__":{"format":"pt","impart_format_version":"1"},'


@dataclass(frozen=True, slots=True)
class TermForm:
    """How a codec's terms are written: parameters, and each part's name and dimensions."""

    codec: str
    params: Params
    parts: tuple[tuple[str, int], ...]


class Forms:
    """The forms of a codec's terms, learned by encoding a small matrix."""

    def __init__(self, codec: Codec) -> None:
        m, n = _PROBE_SHAPE
        matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 1e-4
        self._codec = codec
        terms = (
            term
            for params in codec.probes(_PROBE_SHAPE)
            for term in codec.encode("probe", TensorSource(matrix), params, seed=0)
        )
        self._forms = {term.codec: _form(term) for term in terms}

    def entry(self, entry: TensorEntry, params: Params) -> TensorEntry:
        """Return the entry as it will be once the matrix is encoded with `params`."""
        forms = (self._forms[codec] for codec in self._codec.terms_of(params))
        terms = tuple(
            TermEntry(form.codec, {k: params.get(k, v) for k, v in form.params.items()})
            for form in forms
        )
        return replace(entry, terms=terms, error=_USUAL_ERROR)

    def header_bytes(self, entries: Sequence[TensorEntry], payload_bytes: int) -> int:
        """Bytes of delta.safetensors' header, its length field included, to within a digit."""
        offset = len(str(payload_bytes))
        fixed = len('"":{"dtype":"F16","shape":[],"data_offsets":[,]},') + 2 * offset
        total = len(_METADATA) + 2
        for index, entry in enumerate(entries):
            if entry.exact_row_start is not None:
                total += fixed + len(f"{index}.exact") + len(str(list(entry.shape))) - 2
            digits = len(str(max(entry.shape)))
            for t, term in enumerate(entry.terms):
                form = self._forms.get(term.codec)
                for name, ndim in form.parts if form else ():
                    total += fixed + len(f"{index}.{t}.{name}") + ndim * (digits + 1) - 1
        return 8 + total


def _form(term: Term) -> TermForm:
    parts = tuple((name, tensor.ndim) for name, tensor in term.tensors().items())
    return TermForm(term.codec, term.params(), parts)


def surroundings_bytes(config: DeltaConfig, companions: Mapping[str, bytes]) -> int:
    """Bytes of every file but delta.safetensors: config, card, checksums, companions."""
    listed: Iterable[str] = (*_LISTED, *companions)
    return (
        len(dump_config(config))
        + len(model_card(config, None).encode())
        + sum(_SUM_LINE + len(name) for name in listed)
        + sum(map(len, companions.values()))
    )
