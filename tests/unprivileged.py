"""Run code as a user who may not read everything: root may, and tests often run as root."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

UID = 10001  # the container's user

DROP = f"""
import os
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({UID})
    os.setuid({UID})
"""


def run_unprivileged(
    imports: str, code: str, arguments: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `imports` as whoever runs the tests, whose interpreter others may not be able to read,
    then `code` as `UID` (or, where that is not root, as the same user).
    """
    return subprocess.run(
        [sys.executable, "-c", f"{imports}\n{DROP}\n{code}", *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that everybody may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def forbid(path: Path) -> None:
    """Take away every permission: `UID` is not its owner, and who is no root is not let in."""
    path.chmod(0)
