"""Every launch site of the benchmark."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.cases import Sizes, Spec
from benchmarks.gpu.delta_cases import block_specs, factor_specs
from benchmarks.gpu.layer_cases import layer_specs
from benchmarks.gpu.shapes import Codec, Group, ModelShape


def spec_parts(
    shape: ModelShape,
    codecs: tuple[Codec, ...],
    sizes: Sizes,
    groups: tuple[Group, ...] | None = None,
) -> dict[str, Iterator[Spec]]:
    """Of some groups of linears (default: all), by what may fail together: layers, blocks of one
    setting, factors.
    """
    chosen = shape.groups() if groups is None else groups
    parts = {"layer": layer_specs(shape, sizes, chosen)}
    for codec in codecs:
        parts[f"{codec.bits}bit-s{codec.n_blocks}"] = block_specs(codec, sizes, chosen)
    return parts | {"factors": factor_specs(sizes, chosen)}


def all_specs(
    shape: ModelShape,
    codecs: tuple[Codec, ...],
    sizes: Sizes,
    groups: tuple[Group, ...] | None = None,
) -> Iterator[Spec]:
    """The same, one after the other."""
    for specs in spec_parts(shape, codecs, sizes, groups).values():
        yield from specs
