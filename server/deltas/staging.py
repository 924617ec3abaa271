"""Decode an artifact's tensors into what is copied into a slot: readers' work, in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from compressor.artifact.reader import Artifact
from compressor.codecs.term import TensorDelta
from compressor.errors import UnsupportedTensor
from compressor.usable_cpus import usable_cpus
from server.deltas.failures import check_range
from server.deltas.parameter import DeltaParameter, StagedParameter

DECODE_THREADS = 8


def decode_threads(device: torch.device) -> int:
    """Threads for one variant: on a GPU's host cores are idle, on a CPU the steps need them."""
    return min(DECODE_THREADS, usable_cpus().cpus) if device.type == "cuda" else 1


def stage_variant(
    artifact: Artifact,
    parameters: Mapping[str, DeltaParameter],
    n_threads: int = 1,
    replaces: Callable[[DeltaParameter], bool] = lambda parameter: False,
    check: Callable[[TensorDelta, StagedParameter], None] = lambda delta, staged: None,
) -> tuple[StagedParameter, ...]:
    """Decode every tensor of the artifact for this base. Raises ArtifactError or
    UnsupportedTensor if any does not fit, or has values that the base's dtype cannot hold: a
    variant is served whole or not at all.

    replaces  whether the slot's reconstructed weights stand in for a parameter's terms
    check     is told of every tensor; what it raises ends the load
    """
    untied = artifact.config.base.untied_names

    def stage(delta: TensorDelta) -> StagedParameter:
        parameter = parameters.get(delta.name)
        if parameter is None:  # registration asks first (`check_servable`)
            raise UnsupportedTensor(
                f"{delta.name}: this server cannot give variants their own value of it; serve the "
                "reconstructed checkpoint instead (impart reconstruct)"
            )
        if delta.name in untied:
            if delta.name not in parameter.untied:
                raise UnsupportedTensor(
                    f"{delta.name}: the served model cannot untie it from what it is tied to; "
                    "serve the reconstructed checkpoint instead (impart reconstruct)"
                )
            parameter = parameter.untied[delta.name]
        staged = parameter.stage(delta, without_terms=replaces(parameter))
        check_range(delta.name, *staged.tensors)
        check(delta, staged)
        return staged

    if n_threads == 1:
        return tuple(map(stage, artifact.tensors))
    with ThreadPoolExecutor(n_threads, "delta-decoder") as pool:
        return tuple(pool.map(stage, artifact.tensors))


def reader_threads(device: torch.device) -> int:
    """Variants that are read at once."""
    return 2 if device.type == "cuda" else 1
