"""Log lines, plain or JSON; both carry the request id and the access line's fields."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, Literal

from server.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error", "critical")
EXTRA = (
    "request_id",
    "tenant",
    "key_id",
    "model",
    "duration_s",
    "prompt_tokens",
    "completion_tokens",
    "ended",
)


def configure(level: str, style: Literal["plain", "json"]) -> None:
    """Send every log line to standard error. Raises ConfigError on an unknown level."""
    if level.lower() not in LEVELS:
        raise ConfigError(f"log_level must be one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else PlainFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level.lower() == "info":  # torch tells statistics of its caches at the end of the process
        logging.getLogger("torch").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # names its plugins at each start


def extras(record: logging.LogRecord) -> dict[str, Any]:
    """Return the known extra fields that this record has."""
    return {name: value for name in EXTRA if (value := getattr(record, name, None)) is not None}


class PlainFormatter(logging.Formatter):
    """One line for people: time, level, logger, message, then ``key=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s%(fields)s")

    def format(self, record: logging.LogRecord) -> str:
        record.fields = "".join(f" {name}={value}" for name, value in extras(record).items())
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, time in UTC."""

    def __init__(self) -> None:
        super().__init__()
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
