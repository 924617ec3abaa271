"""Where text workers read the tokenizers of variants: folders of files that were verified before.

The artifact itself may change on disk at any time; these copies do not. They are named by what is
in them, so that variants with equal files share one, and a worker's copy in memory.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path


class TokenizerStore:
    """Thread-safe. The folder is made with the first tokenizer and removed by `close`."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._lock = threading.Lock()

    def put(self, files: Mapping[str, bytes]) -> Path:
        """Return a folder with exactly these files."""
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(f"{name}\0{len(files[name])}\0".encode())
            digest.update(files[name])
        with self._lock:
            if self._root is None:
                self._root = Path(tempfile.mkdtemp(prefix="impart-text-"))
            folder = self._root / digest.hexdigest()
            if not folder.exists():
                made = Path(tempfile.mkdtemp(dir=self._root))
                for name, content in files.items():
                    (made / name).write_bytes(content)
                made.rename(folder)
        return folder

    def close(self) -> None:
        """Remove all of it."""
        with self._lock:
            if self._root is not None:
                shutil.rmtree(self._root, ignore_errors=True)
                self._root = None
