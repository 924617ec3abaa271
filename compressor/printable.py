"""Text from files of unknown origin, made safe to show in a terminal or a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """Replace control characters, line ends, direction marks and half characters by escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
