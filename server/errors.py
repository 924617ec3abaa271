"""Every error the server raises on purpose, with its HTTP status and OpenAI's `code`, by which
clients tell errors apart; `server.api.errors` makes answers of them.

    ServeError 500                      server_error
    ├── ClientError 400
    │   ├── InvalidRequest 400          which rule a field breaks, or none; `param` names it
    │   │   └── ContextTooLong          context_length_exceeded: the prompt, or it and its output
    │   ├── Unauthenticated 401         invalid_api_key: no key, or none that is known here
    │   ├── Forbidden 403               insufficient_permissions
    │   ├── ModelNotFound 404           model_not_found, also where it is not for this tenant
    │   ├── SourceNotFound 404          source_not_found: nothing is where a variant is to come from
    │   ├── Conflict 409                conflict: things are such now that it cannot be done
    │   ├── BodyTooLarge 413            request_too_large
    │   ├── UnsupportedMediaType 415    unsupported_content_type
    │   ├── ArtifactRefused 422         artifact_refused: what was sent or named cannot be served
    │   └── RateLimited 429             rate_limit_exceeded; `retry_after_s` says when
    │       ├── TooManyAtOnce           for whoever counts refusals
    │       └── QuotaExceeded           insufficient_quota: trying again does not help
    ├── DeltaBroken 424                 model_unusable: its artifact is wrong, nobody need try again
    ├── Unavailable 503                 service_unavailable: try again; `retry_after_s` says when
    │   ├── Overloaded                  server_is_overloaded
    │   │   ├── QueueFull               too many requests wait, or their bodies are too large
    │   │   ├── NoSlot                  every slot is in use and stayed so
    │   │   └── LoadsBehind             other variants are loaded first, for longer than it has time
    │   ├── Draining
    │   ├── TextLimit                   work on this text ran into the limits of text workers
    │   ├── LimitsUnreachable           what a tenant has used cannot be read now
    │   ├── SourceUnreachable           where a variant should come from does not answer now
    │   ├── DeltaUnusable               this variant's artifact cannot be read now
    │   ├── DeltasUnreadable            the directory of the deltas cannot be read now
    │   └── StateUnwritable             a change could not be kept, so it was not made
    ├── DeadlineExceeded 504            timeout
    ├── StorageFull 507                 insufficient_storage: no room on disk for one more variant
    └── EngineError
        ├── GenerationFailed 500        this request only
        └── EngineDead 503              service_unavailable: every request; the process exits
    ConfigError                         wrong settings at start-up; exit code 2

Messages go to clients: they name the remedy and hold no path, address or traceback.
"""

from __future__ import annotations

from typing import ClassVar, Self


class ServeError(Exception):
    """Root of the tree.

    kind  the wire's `type`
    code  the wire's `code`; None is null there
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: str | None = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.retry_after_s = retry_after_s


class ClientError(ServeError):
    """The caller can fix it."""

    status = 400
    kind = "invalid_request_error"
    code: str | None = None


class InvalidRequest(ClientError):
    """A field of the request is wrong."""


class ContextTooLong(InvalidRequest):
    """The prompt, or the prompt and its output, do not fit."""

    code = "context_length_exceeded"

    @classmethod
    def by(cls, max_model_len: int, excess: str, *, param: str) -> Self:
        """Return it in the one wording for it: OpenAI's, which clients search for."""
        known = f"This model's maximum context length is {max_model_len} tokens."
        return cls(f"{known} However, {excess}", param=param)


class Unauthenticated(ClientError):
    """The request has no key, or none that this server knows."""

    status = 401
    code = "invalid_api_key"


class ModelNotFound(ClientError):
    """No base, variant or alias of that name."""

    status = 404
    code = "model_not_found"


class Forbidden(ClientError):
    """Whoever asks may not have it done."""

    status = 403
    code = "insufficient_permissions"


class SourceNotFound(ClientError):
    """Nothing is at the place that a variant should come from."""

    status = 404
    code = "source_not_found"


class Conflict(ClientError):
    """It cannot be done as things are now."""

    status = 409
    code = "conflict"


class ArtifactRefused(ClientError):
    """What was sent, or is at the place that was named, cannot be served here."""

    status = 422
    code = "artifact_refused"


class BodyTooLarge(ClientError):
    """The request body exceeds the cap."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(ClientError):
    """The body is not declared as JSON."""

    status = 415
    code = "unsupported_content_type"


class RateLimited(ClientError):
    """The tenant's own limit is reached for now."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class TooManyAtOnce(RateLimited):
    """The tenant has as many requests running as it may."""


class QuotaExceeded(RateLimited):
    """The tenant has spent what it may use in this day or month."""

    kind = "insufficient_quota"
    code = "insufficient_quota"


class DeltaBroken(ServeError):
    """The variant's artifact cannot be served as it is: an operator must mend it."""

    status = 424  # clients retry each 5xx, and gateways take a server with many for ill
    code = "model_unusable"


class Unavailable(ServeError):
    """Cannot be served now."""

    status = 503
    kind = "service_unavailable_error"
    code = "service_unavailable"


class Overloaded(Unavailable):
    """There is more work than this server takes."""

    code = "server_is_overloaded"


class QueueFull(Overloaded):
    """The waiting queue is at its limit."""


class NoSlot(Overloaded):
    """Every slot is held by running requests."""


class LoadsBehind(Overloaded):
    """The loads that come first take longer than the request has time."""


class Draining(Unavailable):
    """The server is shutting down."""


class TextLimit(Unavailable):
    """Tokenising or rendering took more time or memory than a text worker may take."""


class LimitsUnreachable(Unavailable):
    """What the tenant has used is kept where it cannot be read now."""


class SourceUnreachable(Unavailable):
    """The place that a variant should come from does not answer."""


class DeltaUnusable(Unavailable):
    """The variant's artifact could not be read or loaded this time."""


class DeltasUnreadable(Unavailable):
    """The directory of the deltas could not be read; the names known before are served."""


class StateUnwritable(Unavailable):
    """The state folder takes no change now; what it held before still counts."""


class DeadlineExceeded(ServeError):
    """The request ran out of its time."""

    status = 504
    code = "timeout"


class StorageFull(ServeError):
    """The disk, or what may be used of it, has no room for one more variant."""

    status = 507
    code = "insufficient_storage"


class EngineError(ServeError):
    """Something failed inside the engine."""


class GenerationFailed(EngineError):
    """One request failed; the engine goes on."""


class EngineDead(EngineError):
    """The engine cannot go on."""

    status = 503
    kind = "service_unavailable_error"
    code = "service_unavailable"


class ConfigError(ServeError):
    """The settings are wrong; raised before serving starts."""
