"""Coverage-guided fuzzing of the artifact reader, for as long as one likes:

    pip install atheris
    python -m tests.compressor.artifact.fuzz CORPUS [libFuzzer options, e.g. -max_total_time=600]

The input is one file of an artifact, as it is or entropy coded, after a byte that says which; the
others are a good artifact's, and the checksums are made right. Anything but an error of ours is a
finding. CORPUS is a directory; an empty one is filled with the good files first.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["compressor"]):
    from compressor.artifact.reader import read_artifact
    from compressor.errors import ArtifactError

from tests.compressor.artifact.mutations import CONFIG, TENSORS, read_files, sealed, write_files
from tests.compressor.artifacts import write_artifact

NAMES = (CONFIG, TENSORS)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path, whole = Path(folder) / "delta", []
        for coded in (False, True):
            write_artifact(path, coded=coded, overwrite=True)
            whole.append(read_files(path))
        corpus = Path(sys.argv[1])
        corpus.mkdir(parents=True, exist_ok=True)
        inputs = [(good, name) for good in whole for name in NAMES]
        for number, (good, name) in enumerate(inputs):
            (corpus / f"{number}-{name}").write_bytes(bytes([number]) + good[name])

        def one(data: bytes) -> None:
            if not data:
                return
            good, name = inputs[data[0] % len(inputs)]
            write_files(path, sealed(good | {name: data[1:]}))
            with suppress(ArtifactError):
                read_artifact(path)

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
