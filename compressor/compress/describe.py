"""What is said of a base: in an artifact's configuration, and to whoever makes the artifact."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from compressor.artifact.config import BaseInfo
from compressor.artifact.identity import base_identity
from compressor.artifact.servable import ChangedTensor, check_servable, served_base
from compressor.checkpoint.files import DTYPE_NAMES, DTYPES, Checkpoint
from compressor.checkpoint.gguf import source_text
from compressor.checkpoint.layout import read_layout
from compressor.errors import UnsupportedTensor

log = logging.getLogger(__name__)


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that most bytes of the checkpoint have, e.g. ``bfloat16``."""
    total: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype not in DTYPES:
            continue  # a mask, or a table of whole numbers
        dtype = DTYPE_NAMES[DTYPES[tensor.dtype]]
        total[dtype] = total.get(dtype, 0) + tensor.n_bytes
    return max(sorted(total), key=total.__getitem__)


def base_info(
    base: Checkpoint,
    tied: tuple[tuple[str, str], ...],
    name: str | None = None,
    untied: tuple[str, ...] = (),
) -> BaseInfo:
    """Describe the base; its parameters are counted once where they are tied."""
    twins = {alias for alias, target in tied if target in base.tensors}
    return BaseInfo(
        identity=base_identity(base.path),
        name_or_path=name or base.name,
        n_parameters=sum(
            math.prod(t.shape) for name, t in base.tensors.items() if name not in twins
        ),
        dtype=checkpoint_dtype(base),
        tied=tied,
        untied=untied,
        revision=base.revision,
        quantisation=_stored_as(base),
    )


def warn_if_unservable(base: Checkpoint, tensors: Iterable[ChangedTensor]) -> tuple[str, ...]:
    """Say at once that no server of ours will serve what is about to be made; return it as notes.

    The artifact is of use without one: `reconstruct`, `merge` and `export` take it.
    """
    try:
        check_servable(tensors, served_base(read_layout(base.path), base.config))
    except UnsupportedTensor as error:
        note = f"warning: a server will refuse this artifact: {error}"
        log.warning("impart: %s", note)
        return (note,)
    return ()


def _stored_as(base: Checkpoint) -> str | None:
    if base.quantisation is None:
        return source_text(base.path)
    dtype = DTYPE_NAMES[DTYPES[base.quantisation.dtype]]
    return f"{base.quantisation.text}, dequantised to {dtype}"
