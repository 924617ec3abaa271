"""Every error the server raises on purpose; `status` is the one map to HTTP.

    ServeError
    ├── ClientError
    │   ├── InvalidRequest 400      a field is wrong; `param` names it
    │   │   └── ContextTooLong      the prompt, or prompt and output, exceed what the model takes
    │   ├── Unauthenticated 401     no key, or none that is known here
    │   ├── Forbidden 403           whoever asks may not
    │   ├── ModelNotFound 404       no base, variant or alias of that name, or not for this tenant
    │   ├── BodyTooLarge 413
    │   └── RateLimited 429         this tenant's own limit; `retry_after_s` says when
    │       └── QuotaExceeded       spent for the day or month: trying again does not help
    ├── DeltaBroken 424             this variant's artifact is wrong: nobody need try again
    ├── Unavailable 503             try again; `retry_after_s` says when
    │   ├── QueueFull
    │   ├── Draining
    │   ├── NoSlot                  every slot is in use and stayed so
    │   ├── TextLimit               work on this text ran into the limits of text workers
    │   ├── DeltaUnusable           this variant's artifact cannot be read now
    │   └── DeltasUnreadable        the directory of the deltas cannot be read now
    ├── DeadlineExceeded 504
    └── EngineError
        ├── GenerationFailed 500    this request only
        └── EngineDead 503          every request; the process exits non-zero
    ConfigError                     wrong settings at start-up; exit code 2

Messages go to clients: they name the remedy and hold no path, address or traceback.
"""

from __future__ import annotations

from typing import ClassVar


class ServeError(Exception):
    """Root of the tree."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "InternalServerError"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ClientError(ServeError):
    """The caller can fix it."""

    status = 400
    kind = "BadRequestError"


class InvalidRequest(ClientError):
    """A field of the request is wrong."""


class ContextTooLong(InvalidRequest):
    """The prompt, or the prompt and its output, do not fit."""


class Unauthenticated(ClientError):
    """The request has no key, or none that this server knows."""

    status = 401


class ModelNotFound(ClientError):
    """No base, variant or alias of that name."""

    status = 404
    kind = "NotFoundError"


class Forbidden(ClientError):
    """Whoever asks may not have it done."""

    status = 403
    kind = "PermissionDeniedError"


class BodyTooLarge(ClientError):
    """The request body exceeds the cap."""

    status = 413
    kind = "RequestEntityTooLarge"


class RateLimited(ClientError):
    """The tenant's own limit is reached for now."""

    status = 429


class QuotaExceeded(RateLimited):
    """The tenant has spent what it may use in this day or month."""


class DeltaBroken(ServeError):
    """The variant's artifact cannot be served as it is: an operator must mend it."""

    status = 424  # clients retry each 5xx, and gateways take a server with many for ill
    kind = "FailedDependencyError"


class Unavailable(ServeError):
    """Cannot be served now."""

    status = 503
    kind = "ServiceUnavailableError"


class QueueFull(Unavailable):
    """The waiting queue is at its limit."""


class Draining(Unavailable):
    """The server is shutting down."""


class NoSlot(Unavailable):
    """Every slot is held by running requests."""


class TextLimit(Unavailable):
    """Tokenising or rendering took more time or memory than a text worker may take."""


class DeltaUnusable(Unavailable):
    """The variant's artifact could not be read or loaded this time."""


class DeltasUnreadable(Unavailable):
    """The directory of the deltas could not be read; the names known before are served."""


class DeadlineExceeded(ServeError):
    """The request ran out of its time."""

    status = 504
    kind = "TimeoutError"


class EngineError(ServeError):
    """Something failed inside the engine."""


class GenerationFailed(EngineError):
    """One request failed; the engine goes on."""


class EngineDead(EngineError):
    """The engine cannot go on."""

    status = 503
    kind = "ServiceUnavailableError"


class ConfigError(ServeError):
    """The settings are wrong; raised before serving starts."""
