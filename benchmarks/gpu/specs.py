"""Every launch site of the benchmark."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.cases import Sizes, Spec
from benchmarks.gpu.delta_cases import delta_specs
from benchmarks.gpu.layer_cases import layer_specs
from benchmarks.gpu.shapes import Codec, Group, ModelShape


def all_specs(
    shape: ModelShape,
    codecs: tuple[Codec, ...],
    sizes: Sizes,
    groups: tuple[Group, ...] | None = None,
) -> Iterator[Spec]:
    """Of some groups of linears (default: all)."""
    chosen = shape.groups() if groups is None else groups
    yield from layer_specs(shape, sizes, chosen)
    yield from delta_specs(shape, codecs, sizes, chosen)
