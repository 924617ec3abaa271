"""What is said of a base: in an artifact's configuration, and to whoever makes the artifact."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from compressor.artifact.config import BaseInfo
from compressor.artifact.identity import base_identity, identity_of
from compressor.artifact.servable import ChangedTensor, check_servable, served_base
from compressor.checkpoint.files import DTYPE_NAMES, DTYPES, Checkpoint
from compressor.checkpoint.gguf import source_bits, source_text
from compressor.checkpoint.layout import read_layout
from compressor.checkpoint.original import OPTION
from compressor.errors import UnsupportedTensor

log = logging.getLogger(__name__)

_FEW_BITS = 6  # with 8 a delta of the dequantised weights is still far better than none


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


def named(original: Checkpoint) -> dict[str, str]:
    """What an artifact records of the weights that its differences were taken from."""
    record = {"identity": identity_of(original), "name_or_path": original.name}
    return record if original.revision is None else record | {"revision": original.revision}


def warn_of_rounding(base: Checkpoint) -> tuple[str, ...]:
    """Say at once that a delta will hold the rounding errors of a base of few bits; return it as
    notes.
    """
    bits = source_bits(base.path) if base.quantisation is None else base.quantisation.bits
    if bits is None or bits > _FEW_BITS or _is_published_so(base):
        return ()
    note = (
        f"warning: {base.name} is stored in {bits} bits, and the difference from it holds its "
        "rounding errors besides what was tuned, so that the delta can be worse than none; if the "
        f"fine-tune was made from the weights before they were quantised, name them: {OPTION}"
    )
    log.warning("impart: %s", note)
    return (note,)


def _is_published_so(base: Checkpoint) -> bool:
    """gpt-oss has no other weights."""
    return base.quantisation is not None and base.quantisation.method == "mxfp4"


def _stored_as(base: Checkpoint) -> str | None:
    if base.quantisation is None:
        return source_text(base.path)
    dtype = DTYPE_NAMES[DTYPES[base.quantisation.dtype]]
    return f"{base.quantisation.text}, dequantised to {dtype}"
