"""What a client reads of an artifact that cannot be used, and whether it should wait."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from compressor.errors import (
    Corrupt,
    ImpartError,
    NotADelta,
    Unreadable,
    UnsupportedTensor,
    WrongBase,
)
from server.deltas.failures import Changed, Failed, Failure, failure_of, is_lasting
from server.errors import DeltaBroken, DeltaUnusable


def unreadable(number: int) -> Unreadable:
    error = Unreadable(f"delta_config.json cannot be read: {os.strerror(number)}")
    error.__cause__ = OSError(number, os.strerror(number), "/secret/path")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Corrupt("delta_config.json: cut"), "Corrupt: delta_config.json: cut"),
        (NotADelta("no SHA256SUMS here"), "NotADelta"),
        (WrongBase("made for /secret/path"), "another base"),
        (UnsupportedTensor("model.x"), "model.x"),
    ],
)
def test_what_is_wrong_with_the_bytes_lasts_and_nobody_is_told_to_wait(
    error: ImpartError, says: str
) -> None:
    assert is_lasting(error)
    told = failure_of(error).error_for("mine")
    assert isinstance(told, DeltaBroken)
    assert (told.status, told.param, told.retry_after_s) == (424, "model", None)
    assert told.message.startswith("`mine` cannot be served: ")
    assert says in told.message
    assert "secret" not in told.message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (unreadable(errno.EMFILE), "the server has too many open files"),
        (unreadable(errno.ENFILE), "the system has too many open files"),
        (unreadable(errno.ENOMEM), "not enough memory"),
        (unreadable(errno.EACCES), "Permission denied"),
        (OSError(errno.EIO, "I/O error", "/secret/path"), "I/O error"),
        (OSError(errno.ENOSPC, "No space", "/secret/path"), "no space left"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA: /secret/path"), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "enough"),
        (Changed(), "changed"),
        (ValueError("/secret/path"), "log"),
    ],
)
def test_what_the_system_refuses_may_pass_and_says_nothing_of_the_bytes(
    error: Exception, says: str
) -> None:
    assert not is_lasting(error)
    told = failure_of(error).error_for("mine")
    assert isinstance(told, DeltaUnusable)
    assert told.status == 503
    assert told.retry_after_s
    assert says in told.message
    assert "secret" not in told.message
    assert "Corrupt" not in told.message
    assert "copy it again" not in told.message


def test_failure_that_is_carried_is_told_as_it_is() -> None:
    failure = Failure("why", "what to do")
    assert failure_of(Failed(failure)) is failure
