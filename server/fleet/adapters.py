"""PEFT adapters at a place, served without a step of the user's: a child runs ``impart import``.

The server loads no encoder: a child reads the base's checkpoint and the adapter, with the limits of
time that it has, at low priority, and writes an artifact, which is then held to what any other is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from compressor.artifact.files import GENERATION, TOKENIZER_FILES
from server.errors import ArtifactRefused, SourceNotFound
from server.fleet.files import PlaceFiles
from server.fleet.folder import ManagedFolder, remove, telling_full
from server.setting_kinds import size_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TIMEOUT_S = 1800
LOW_PRIORITY = 10
MAX_SAID_CHARS = 500
_FILES = (CONFIG, WEIGHTS, GENERATION, *TOKENIZER_FILES)


class AdapterImport:
    """base: the checkpoint that this server has loaded."""

    def __init__(self, base: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._base = base
        self._timeout_s = timeout_s

    def fetch(
        self, files: PlaceFiles, name: str, folder: ManagedFolder, max_bytes: int
    ) -> tuple[Path, str] | None:
        """Fetch an adapter; return its folder and digest, None if there is no adapter.

        Raises ArtifactRefused, StorageFull, and as `PlaceFiles` does.
        """
        if files.size(CONFIG) is None:
            return None
        if files.size(WEIGHTS) is None:
            raise SourceNotFound(
                f"The adapter has no {WEIGHTS}; pickles are never read: save it again with "
                "safetensors."
            )
        found = {file: files.size(file) for file in _FILES}
        sizes = {file: size for file, size in found.items() if size is not None}
        total = sum(sizes.values())
        if total > max_bytes:
            raise ArtifactRefused(
                f"The adapter has {total} bytes, and {size_text(max_bytes)} are the limit: see "
                "--max-artifact-bytes."
            )
        folder.check_room(3 * total)  # what is made of it lies beside it for a while
        staged = folder.staging(name, "adapter")
        remove(staged)
        target = staged / name
        target.mkdir(parents=True)
        digest = hashlib.sha256()
        with telling_full():
            for file, size in sorted(sizes.items()):
                digest.update(f"{file} {size}\n".encode())
                with (target / file).open("wb") as out:
                    for piece in files.read(file, 0, size):
                        digest.update(piece)
                        out.write(piece)
        return target, digest.hexdigest()

    def convert(self, adapter: Path) -> Path:
        """Make an artifact of a fetched adapter; return its folder. Raises ArtifactRefused."""
        out = adapter.parent / "delta"
        command = [
            sys.executable,
            "-m",
            "compressor",
            "import",
            self._base,
            adapter,
            out,
            "--quiet",
        ]
        # One thread: the cores are for steps. No GPU: its memory is the engine's.
        alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **alone},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as child:
            os.setpriority(os.PRIO_PROCESS, child.pid, LOW_PRIORITY)
            try:
                _, says = child.communicate(timeout=self._timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                raise ArtifactRefused(
                    f"Converting the adapter took more than {self._timeout_s:g} s."
                ) from None
        if child.returncode != 0:
            raise ArtifactRefused(f"The adapter cannot be converted: {self._plain(says, adapter)}")
        return out

    def _plain(self, says: str, adapter: Path) -> str:
        """The last words of the child without paths: they are shown to tenants."""
        for path, word in ((adapter.parent, "there"), (self._base, "the base")):
            says = says.replace(str(path), word)
        return (says.strip().splitlines() or ["it gave no reason"])[-1][:MAX_SAID_CHARS]
