"""Writing a delta artifact: tensors staged one by one, resumable, then published at once.

Beside the output ``NAME`` stand, while a run lasts or after it was interrupted:

    .NAME.lock       held by the running writer
    .NAME.partial/   what is encoded so far (`staging`), and ``artifact/``, where the files of the
                     artifact grow that is renamed to NAME in the end

A later run with the same `run_key` takes the encoded tensors over and writes the same bytes as an
uninterrupted one; with another key it starts afresh.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from compressor.artifact.assembly import GroupOf, TensorBytes, assemble
from compressor.artifact.config import DeltaConfig, dump_config
from compressor.artifact.files import (
    CHECKSUMS,
    CONFIG,
    README,
    TENSORS,
    format_checksums,
    is_auxiliary,
)
from compressor.artifact.staging import StagedTensor, Staging
from compressor.atomic import (
    RunLock,
    publish_directory,
    recover_directory,
    write_new,
)
from compressor.codecs import TensorDelta
from compressor.errors import InputError, OutputError


class ArtifactWriter:
    """Use as a context manager; `finish` publishes.

    out        the artifact directory to be
    run_key    names inputs and settings; staged tensors of a run with another key are discarded
    overwrite  replace an artifact that is already there (never anything else)
    resume     take over what an interrupted run with the same key has staged

    Entering takes the lock and raises OutputError if another run holds it or `out` exists.
    Leaving without `finish` keeps the staged tensors for the next run, unless the input is wrong.
    """

    staging: Staging

    def __init__(
        self, out: str | Path, *, run_key: str, overwrite: bool = False, resume: bool = True
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self._partial = self.out.with_name(f".{self.out.name}.partial")
        self._files = self._partial / "artifact"
        self._run_key = run_key
        self._overwrite = overwrite
        self._resume = resume
        self._tensors: dict[str, StagedTensor] = {}
        self._written: TensorBytes | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(RunLock(self.out))
                recover_directory(self.out)
                self._check_output()
                self.staging = Staging(self._partial, self._run_key, resume=self._resume)
            except OSError as error:
                raise OutputError(f"cannot write {self.out}: {error.strerror}") from error
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        shutil.rmtree(self._files, ignore_errors=True)
        if isinstance(error, InputError):
            self.staging.remove()  # the same input would end in the same error
        self._open.close()

    def reuse(self, name: str) -> StagedTensor | None:
        """Make what an interrupted run added under this name one of the artifact's tensors."""
        staged = self.staging.find(name)
        if staged is not None:
            self._tensors[name] = staged
        return staged

    def add(self, delta: TensorDelta, error: float | None = None) -> StagedTensor:
        """Stage one more of the artifact's tensors. error is the relative Frobenius error of dW."""
        assert delta.name not in self._tensors
        staged = self.staging.add(delta.name, delta, error)
        self._tensors[delta.name] = staged
        return staged

    def write_tensors(
        self,
        tensors: Iterable[StagedTensor] | None = None,
        group_of: GroupOf = lambda entry, is_exact: "tensors",
        *,
        coded: bool = False,
        always: bool = False,
    ) -> TensorBytes:
        """Write ``delta.safetensors`` where `finish` publishes it, instead of any before.

        tensors   all of the artifact's; None: those that were added
        group_of  the group of the byte table that a tensor, or its exact rows, are counted in
        coded     entropy code them, unless that does not pay
        always    code them whatever comes of it
        """
        if tensors is not None:
            self._tensors = {tensor.name: tensor for tensor in tensors}
        shutil.rmtree(self._files, ignore_errors=True)
        self._written = None
        try:
            self._files.mkdir()
            chosen = list(self._tensors.values())
            path = self._files / TENSORS
            self._written = assemble(chosen, group_of, path, coded=coded, always=always)
        except OSError as error:
            raise OutputError(f"cannot write {self.out.name}: {error.strerror or error}") from error
        return self._written

    def finish(
        self,
        config: DeltaConfig,
        aux: Mapping[str, bytes] | None = None,
        readme: bytes | Callable[[int], bytes] = b"",
    ) -> str:
        """Write all other files, put the directory into place, and return its digest.

        config  its `tensors` are filled in; it has a coding if `write_tensors` says that it coded
        aux     tokenizer files and the like, by name
        readme  the model card, or a function of the bytes of all other files that returns it
        """
        aux = dict(aux or {})
        for name in aux:
            if not is_auxiliary(name):
                raise OutputError(f"{name} cannot travel in a delta artifact")
        written = self._written or self.write_tensors()
        assert written.is_coded == (config.coding is not None)
        entries = (self._tensors[name].entry for name in sorted(self._tensors))
        text = dump_config(config.with_tensors(tuple(entries)))
        try:
            digest = self._publish({CONFIG: text} | aux, written.n_bytes, readme)
        except OSError as error:
            raise OutputError(f"cannot write {self.out.name}: {error.strerror or error}") from error
        self.staging.remove()
        return digest

    def _publish(
        self, texts: Mapping[str, bytes], n_bytes: int, readme: bytes | Callable[[int], bytes]
    ) -> str:
        """Write the small files beside the tensors and rename the folder; return the digest."""
        with (self._files / TENSORS).open("rb") as stream:
            sums = {TENSORS: hashlib.file_digest(stream, "sha256").hexdigest()}
        for name, text in texts.items():
            n_bytes += write_new(self._files / name, [text])
            sums[name] = hashlib.sha256(text).hexdigest()
        listing = format_checksums(sums)
        n_bytes += write_new(self._files / CHECKSUMS, [listing])
        card = readme if isinstance(readme, bytes) else readme(n_bytes)
        if card:
            write_new(self._files / README, [card])
        publish_directory(self._files, self.out)
        return hashlib.sha256(listing).hexdigest()

    def _check_output(self) -> None:
        if not (self.out.exists() or self.out.is_symlink()):
            return
        if self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir()):
            return  # an empty directory, made for us
        if not self._overwrite:
            raise OutputError(f"{self.out} exists; remove it or ask for it to be overwritten")
        if self.out.is_symlink() or not (self.out / CHECKSUMS).is_file():
            raise OutputError(f"{self.out} exists and is not a delta artifact; not overwritten")
