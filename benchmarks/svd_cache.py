"""Decompose each matrix once for all ratios and seeds of a benchmark, not once for each."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file, save_file

from compressor.codecs.term import MatrixSource
from compressor.encoders import svd


@contextmanager
def cached_spectra(folder: Path | None) -> Iterator[None]:
    """Within the block, whole decompositions come from `folder` where they are known.

    They are found by the matrix' values, so that the results are the same with and without the
    cache. It takes 8 bytes times the square of the shorter side for every matrix. None: no cache.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    original = svd.spectrum

    def cached(name: str, source: MatrixSource, rank: int | None = None) -> svd.Spectrum:
        file = folder / f"{_fingerprint(source)}.safetensors"
        if not file.exists():
            found = original(name, source)._asdict()
            staged = file.with_suffix(f".{os.getpid()}")
            save_file(found, staged)
            staged.replace(file)
        whole = load_file(file)
        keep = len(whole["sigma"]) if rank is None else rank
        return svd.Spectrum(whole["sigma"][:keep], whole["right"][:, :keep].contiguous())

    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("compressor.") and getattr(module, "spectrum", None) is original
    ]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "spectrum", cached))
        yield


def _fingerprint(source: MatrixSource) -> str:
    m, n = source.shape
    digest = hashlib.sha256(f"{m} {n}".encode())
    for start, end in svd.row_strips(m, n):
        digest.update(source.block(start, end, 0, n).contiguous().numpy().data)
    return digest.hexdigest()
