"""Whether this process may read a file or a folder, and what to do where it may not.

Tried, not asked: access lists, capabilities and read-only mounts all have their say. A container's
user often may not read what another one wrote: `save_pretrained` gives weights mode 0600.
Standard library only.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def why_unreadable(path: Path) -> str | None:
    """Say what keeps this process from reading a file or listing a folder, with the remedy; None if
    nothing does.
    """
    try:
        _open(path)
    except PermissionError:
        return _forbidden(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def is_forbidden(path: Path) -> bool:
    """Whether it is there, as far as can be told, and this process may not read it."""
    try:
        _open(path)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _open(path: Path) -> None:
    if not path.is_dir():
        with path.open("rb"):
            return
    with os.scandir(path) as entries:
        for entry in entries:  # to list needs one permission, to enter another
            entry.stat(follow_symlinks=False)
            return


def _forbidden(path: Path) -> str:
    """Blame the outermost folder that cannot be entered, else the path itself."""
    folders = reversed(path.absolute().parents)
    blamed = next((folder for folder in folders if not os.access(folder, os.X_OK)), path)
    try:
        owner = f" (docker run --user {blamed.stat().st_uid})"
    except OSError:
        owner = ""
    user = f" (uid {os.geteuid()})" if hasattr(os, "geteuid") else ""
    return (
        f"{blamed} may not be read by this process's user{user}; allow it with "
        f"`chmod -R a+rX {shlex.quote(str(blamed))}`, or run as the owner{owner}"
    )
