"""What of an artifact a server can serve: one list, for who makes artifacts and who serves them.

`compress` and `import` ask before the work begins, the server when it registers a variant: what is
found here is never found out by a request. It is told of entries and names alone: what a server
finds only in its own model (a module that is called in an unusual way) it tells itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compressor.errors import UnsupportedTensor

if TYPE_CHECKING:
    from compressor.checkpoint.layout import Layout

_REMEDY = "serve the reconstructed checkpoint instead (impart reconstruct)"


class ChangedTensor(Protocol):
    """What is asked of a tensor: an entry of the configuration has it before anything is encoded.

    shape, base_shape  in ``[out, in]`` orientation
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def base_shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base of a server, as far as variants are concerned.

    names       parameters that a variant may have its own value of, each name of a tied one
    embeddings  names of the input embedding
    vocabulary  its rows
    """

    names: Collection[str]
    embeddings: Collection[str]
    vocabulary: int


def served_base(layout: Layout, config: dict[str, Any]) -> ServedBase:
    """What a server with this base would serve, by its checkpoint alone.

    config  the base's ``config.json``
    """
    tables = [p for p in layout.parameters.values() if p.kind == "embedding"]
    text = config.get("text_config")
    found = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    vocabulary = found if isinstance(found, int) else max([0, *(p.shape[0] for p in tables)])
    embeddings = {p.name for p in tables if p.shape[0] == vocabulary}
    aliases = {alias for alias, _ in layout.tied}
    return ServedBase(layout.parameters.keys() | aliases, embeddings, vocabulary)


def check_servable(tensors: Iterable[ChangedTensor], base: ServedBase) -> None:
    """Raises UnsupportedTensor, naming the tensor and the way out, if a server with this base could
    not serve a variant that changes these.
    """
    tensors = list(tensors)
    _check_names([tensor.name for tensor in tensors], base)
    grown = [tensor for tensor in tensors if tensor.shape != tensor.base_shape]
    for tensor in grown:
        if tensor.base_shape[0] != base.vocabulary:
            raise UnsupportedTensor(
                f"{tensor.name}: it has {tensor.shape[0]} rows and the base {tensor.base_shape[0]}"
                f", but a server can add rows for tokens only, to the {base.vocabulary} of the "
                f"vocabulary; {_REMEDY}"
            )
        if tensor.shape[0] != grown[0].shape[0]:
            raise UnsupportedTensor(
                f"{tensor.name}: it has {tensor.shape[0]} rows and {grown[0].name} has "
                f"{grown[0].shape[0]}: they disagree on the number of added tokens; resize all of "
                "them alike (resize_token_embeddings)"
            )
    if grown and not any(tensor.name in base.embeddings for tensor in grown):
        raise UnsupportedTensor(
            f"{grown[0].name}: it has rows for tokens that the embedding has not, which could be "
            "chosen but not read; resize both alike (resize_token_embeddings)"
        )


def _check_names(names: list[str], base: ServedBase) -> None:
    if missing := [name for name in names if name not in base.names]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UnsupportedTensor(
            f"{missing[0]}{more}: this server cannot give variants their own value of it; {_REMEDY}"
        )
