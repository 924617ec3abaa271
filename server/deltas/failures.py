"""Why a variant cannot be served: in words that clients may read, and whether waiting helps.

What is wrong with an artifact's bytes stays wrong until somebody replaces them. What the system
refuses - a file descriptor, memory, permission to read - says nothing of the bytes and may pass.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ArtifactError, Unreadable, UnsupportedTensor, WrongBase
from server.errors import DeltaBroken, DeltaUnusable

log = logging.getLogger(__name__)
MEND_S = 30  # an operator may have seen to it by then
SOON_S = 5
_WHOLE = "serve the reconstructed checkpoint instead (impart reconstruct)"
_COPY = "an operator must compress or copy it again"
_NO_MEMORY = "can't allocate memory"  # torch's words on a CPU, where its error has no class
_SCARCE = {
    errno.EMFILE: "the server has too many open files",
    errno.ENFILE: "the system has too many open files",
    errno.ENOMEM: "the server is out of memory",
    errno.ENOSPC: "there is no space left for temporary files",
    errno.EDQUOT: "there is no space left for temporary files",
}


class Changed(Exception):
    """The files are not those that were registered."""


class Refused(Exception):
    """The artifact may be fine, but this server cannot serve it; the message names the remedy."""


class TermsDiffer(Exception):
    """The terms are whole, but this device computes something else with them; the message names the
    parameter.
    """


class Overflow(UnsupportedTensor):
    """A value of the variant is beyond what the served dtype can hold."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        held = str(dtype).removeprefix("torch.")
        most = torch.finfo(dtype).max
        super().__init__(f"{name}: a value of it is beyond {most:.6g}, all that {held} can hold")


def check_range(name: str, *values: Tensor) -> None:
    """Raise `Overflow` for an infinity: an artifact has none, so a narrow dtype made it."""
    for value in values:
        is_narrow = value.is_floating_point() and value.dtype.itemsize <= 2
        if is_narrow and not bool(value.isfinite().all()):
            raise Overflow(name, value.dtype)


@dataclass(frozen=True, slots=True)
class Failure:
    """Safe to show. `retry_after_s` is None where trying again is of no use."""

    reason: str
    remedy: str
    retry_after_s: int | None = None

    def error_for(self, name: str) -> DeltaBroken | DeltaUnusable:
        """What a request for the variant `name` ends with."""
        message = f"`{name}` cannot be served: {self.reason}; {self.remedy}"
        if self.retry_after_s is None:
            return DeltaBroken(message, param="model")
        return DeltaUnusable(message, param="model", retry_after_s=self.retry_after_s)


class Failed(Exception):
    """Carries a failure to where it is told."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def failure_of(error: BaseException) -> Failure:
    """What to say of an error that opening or loading an artifact ended with."""
    if isinstance(error, Failed):
        return error.failure
    if is_out_of_memory(error):
        return Failure("there is not enough memory for it now", "try again later", SOON_S)
    if isinstance(error, Unreadable):
        return _unreadable(error.__cause__, str(error))
    if isinstance(error, OSError):
        return _unreadable(error, f"it cannot be read ({error.strerror})")
    if isinstance(error, Changed):
        return Failure("its files changed after they were registered", "rescan and try again", 1)
    if isinstance(error, WrongBase):  # its own message names the other base, maybe by its path
        reason = "WrongBase: it was made for another base model"
        return Failure(reason, "an operator must compress it against this one")
    if isinstance(error, Overflow):
        return Failure(str(error), "an operator must serve with --dtype bfloat16")
    if isinstance(error, UnsupportedTensor):
        reason, _, remedy = str(error).rpartition("; ")
        return Failure(reason or remedy, remedy if reason else _WHOLE)
    if isinstance(error, TermsDiffer):
        return Failure(str(error), "an operator must serve with --kernels torch")
    if isinstance(error, Refused):
        return Failure(str(error), "an operator must see to it")
    if isinstance(error, ArtifactError):
        return Failure(f"{type(error).__name__}: {error}", _COPY)
    log.error("a delta could not be loaded", exc_info=error)
    return Failure("it could not be loaded", "an operator finds out why in the log", MEND_S)


def is_lasting(error: BaseException) -> bool:
    """Whether the same bytes end with the same error again."""
    if isinstance(error, Unreadable):
        return False
    return isinstance(error, ArtifactError | UnsupportedTensor | TermsDiffer)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, Unreadable):
        error = error.__cause__ or error
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY in str(error)


def is_scarcity(error: BaseException) -> bool:
    """Whether a resource of the system was missing, which says nothing of what was being read."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in _SCARCE)


def _unreadable(error: BaseException | None, text: str) -> Failure:
    scarce = _SCARCE.get(error.errno or 0) if isinstance(error, OSError) else None
    if scarce is not None:
        return Failure(scarce, "try again later", SOON_S)
    return Failure(text, "an operator must make it readable for the server", MEND_S)
