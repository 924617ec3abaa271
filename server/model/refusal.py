"""What the server says of a base model that it cannot serve: one sentence, with a way out."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from server.errors import ConfigError

log = logging.getLogger(__name__)
MAX_ERROR_CHARS = 400  # of what transformers says, which may be pages
WAY_OUT = (
    "make whole checkpoints of its fine-tunes (impart reconstruct) and serve them with vLLM or "
    "transformers"
)


def in_a_line(error: BaseException) -> str:
    """What an exception says, short and without line breaks."""
    return textwrap.shorten(str(error), MAX_ERROR_CHARS)


def not_served(model: nn.Module | str, why: str) -> ConfigError:
    """`why` has subject and verb, and goes on after a colon."""
    name = model if isinstance(model, str) else type(model).__name__
    return ConfigError(f"{name} cannot be served: {why}; {WAY_OUT}")


@contextmanager
def refused(model: nn.Module | str, doing: str) -> Iterator[None]:
    """An exception that nobody expected of a definition becomes a ConfigError: there are hundreds
    of them, each with code of its own. The traceback is logged for whoever mends it.

    doing  what failed, as the sentence's subject
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        log.debug("%s failed", doing, exc_info=error)
        kind = type(error).__name__
        said = in_a_line(error)
        raise not_served(model, f"{doing} failed with {kind}{': ' * bool(said)}{said}") from error
