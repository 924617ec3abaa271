"""Where and in which dtype a result may be written; said before torch is imported.

An output may never be, contain or lie in what a command reads, whatever the spelling of either
path: links, ``..``, another case on a file system that ignores it, a second mount. Paths are
therefore compared by what the system says is there (device and inode), along both what was typed
and where links lead, and the names that a run uses beside its output count as the output.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from compressor.checkpoint.hub import hub_cache, parse_ref
from compressor.errors import InputError, OutputError

OUTPUT_DTYPES = ("float32", "float16", "bfloat16")
# What runs make and remove beside an output `NAME` (`atomic`, `writer`, `artifact.writer`).
_SCRATCH = (".{}.partial", ".{}.replaced", ".{}.lock")
Identity = tuple[int, int]


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype no checkpoint is written in."""
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise InputError(f"dtype must be one of {', '.join(OUTPUT_DTYPES)}, got {dtype}")


def check_output(
    out: str | Path, inputs: Iterable[str | Path], files: Iterable[str | Path] = ()
) -> None:
    """Raise OutputError if writing `out` could touch anything that is read.

    out     a directory or file that may be there or not
    inputs  directories or Hub ids: `out` may not be one, lie in one or contain one
    files   single files (texts, a recipe): `out` may not be one or contain one
    """
    for given in inputs:
        folder = _folder(given)
        if identity(folder) in _line(out) or _is_below(out, folder):
            where = "is" if _is_same(out, folder) else "lies in"
            raise _refusal(out, where, given)
        for file in _parts(folder):
            if _is_same(out, file):
                raise _refusal(out, "is a file of", given)
            if _holds(out, file):
                raise _refusal(out, "contains files of", given)
        if _holds(out, folder):
            raise _refusal(out, "contains", given)
    for file in map(Path, files):
        if _is_same(out, file) or _holds(out, file):
            where = "is" if _is_same(out, file) else "contains"
            raise _refusal(out, where, file)


def check_free(out: str | Path, *, overwrite: bool) -> None:
    """Raise OutputError if something is there that may not be replaced; writers ask again."""
    path = Path(out)
    is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if os.path.lexists(path) and not overwrite and not is_empty:
        raise OutputError(f"{out} exists; remove it or use --overwrite")


def _refusal(out: str | Path, where: str, given: str | Path) -> OutputError:
    return OutputError(
        f"the output {out} {where} {given}, which is read and must stay as it is; choose another "
        "output"
    )


def _folder(given: str | Path) -> Path:
    """Where a model, adapter or delta lies; of a Hub id, where all models of the Hub do."""
    if not os.path.lexists(given) and parse_ref(str(given)) is not None:
        return hub_cache()
    return Path(given)


def _is_same(out: str | Path, path: Path) -> bool:
    return identity(out) is not None and identity(out) == identity(path)


def _holds(out: str | Path, path: Path) -> bool:
    """Whether `out`, or what a run makes and removes beside it, is or holds this path."""
    absolute = Path(os.path.abspath(out))
    written = [absolute]
    if absolute.name:
        written += [absolute.with_name(name.format(absolute.name)) for name in _SCRATCH]
    return any(identity(place) in _line(path) or _is_below(path, place) for place in written)


def _parts(folder: Path) -> Iterator[Path]:
    """A folder's files: links of the Hub's cache, say, whose targets lie elsewhere."""
    try:
        with os.scandir(folder) as entries:
            yield from (folder / entry.name for entry in entries)
    except OSError:  # whoever reads it says so
        return


def _line(path: str | Path) -> set[Identity]:
    """What a path and every folder above it is, by both spellings."""
    found = {identity(place) for way in _spellings(path) for place in (way, *way.parents)}
    return {identity for identity in found if identity is not None}


def _is_below(path: str | Path, folder: Path) -> bool:
    """Whether the path is the folder or lies in it, also where nothing is there yet."""
    ways = _spellings(folder)
    return any(way.is_relative_to(other) for way in _spellings(path) for other in ways)


def _spellings(path: str | Path) -> list[Path]:
    """As it is typed (with ``..`` taken back as text, which is how outputs are written), and
    where it leads.
    """
    typed = os.path.abspath(path)
    return [Path(typed), Path(os.path.realpath(typed)), Path(os.path.realpath(path))]


def identity(path: str | Path) -> Identity | None:
    """Device and inode of what a path leads to, None if nothing is there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
