"""Which of the CPU kernels this machine can run: each is tried in a process of its own first.

A compiler may end the process that asks it for code it cannot make, and wrong code looks like any
other. So the first compilation of every kernel on a machine, and a comparison with torch on small
inputs, happen in a child process (`server.ops.cpu.check_child`). What crashes, is wrong or hangs
there is not used: torch does its work, and a warning says so. The child leaves the compiled code in
the cache, so that it is made once; the verdicts lie beside it and go with it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from server.ops.cpu.compile import VERDICTS, cache_folder, cache_root_of
from server.ops.cpu.features import Target, host_target

log = logging.getLogger(__name__)

# Each is a class of this package that `server.ops.cpu.kernels` makes.
NAMES = ("attention", "prefill", "rotary", "rows", "embedding", "linear", "widened")
# -P: the folder that the server was started in may hold a `server` package of its own.
CHILD = ("-P", "-m", "server.ops.cpu.check_child", "--end-with-stdin")
TIMEOUT_S = 300.0  # for one kernel, compilation included: minutes on a busy, slow machine
FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")  # no kernel does that to its process
USUAL_S = 85  # for all of them, on two idle cores
PACKAGES = Path(__file__).resolve().parents[3]
Verdicts = dict[str, str | None]  # kernel -> what is wrong with it


def wanted_kernels(target: Target) -> tuple[str, ...]:
    """Those that are of use on this CPU: without units for bfloat16 the server computes in float32,
    and `linear` takes minutes to compile.
    """
    useful = {"linear": target.has_bf16_products}
    return tuple(name for name in NAMES if useful.get(name, True))


def untried_kernels() -> tuple[str, ...]:
    """Wanted kernels without a verdict: nobody has compiled them here, see `usable_kernels`."""
    known = _read(_path(cache_folder()))
    return tuple(name for name in wanted_kernels(host_target()) if name not in known)


def passed_kernels() -> frozenset[str]:
    """The kernels that passed their trial before; nothing is compiled."""
    known = _read(_path(cache_folder()))
    wanted = wanted_kernels(host_target())
    return frozenset(name for name in wanted if name in known and known[name] is None)


def usable_kernels(
    *, child: Sequence[str] = CHILD, environment: Mapping[str, str] | None = None
) -> frozenset[str]:
    """The kernels that passed their trial on this machine, now or before. Warns of the others.

    Each verdict is kept as soon as it is known: who stops on the way goes on from there.

    child, environment: see `try_kernels`.
    """
    target, folder = host_target(), cache_folder()
    names = wanted_kernels(target)
    path = _path(folder)
    verdicts = _read(path)
    if not verdicts.keys() >= set(names):
        with _alone(folder):
            verdicts = _read(path)
            missing = [name for name in names if name not in verdicts]
            if missing:
                log.info(
                    "the server compiles %d CPU kernels for %s, once; that usually takes about "
                    "%d s, and minutes on a busy machine",
                    len(missing),
                    target,
                    USUAL_S * len(missing) / len(NAMES),
                )

                def keep(made: Verdicts) -> None:
                    verdicts.update(made)
                    _write(path, verdicts)

                try_kernels(missing, folder, keep=keep, child=child, environment=environment)
    for name in names:
        problem = verdicts.get(name)
        if problem is not None:
            log.warning(
                "the CPU kernel %r %s on %s: torch does its work instead, slower%s",
                name,
                problem,
                target,
                "" if path is None else f"; delete {path} to have it tried again",
            )
    return frozenset(name for name in names if verdicts.get(name) is None)


def try_kernels(
    names: Sequence[str],
    folder: Path | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    keep: Callable[[Verdicts], None] = lambda _: None,
    child: Sequence[str] = CHILD,
    environment: Mapping[str, str] | None = None,
) -> Verdicts:
    """Compile and compare these kernels in child processes, one after the other.

    A child goes on with the next kernel until one ends it; the rest get a new one.

    folder       where compiled code goes, a `cache_folder`; default: the child's own
    timeout_s    for one kernel
    keep         is called with each verdict as soon as it is known
    child        Python's arguments before the kernels' names
    environment  of the child; default: this process's
    """
    settings = dict(os.environ if environment is None else environment)
    # The child finds this package where this process found it, however it was started.
    found = [str(PACKAGES), *filter(None, [settings.get("PYTHONPATH")])]
    settings["PYTHONPATH"] = os.pathsep.join(found)
    if folder is not None:
        settings["NUMBA_CACHE_DIR"] = str(cache_root_of(folder))
    verdicts: Verdicts = {}
    left = list(names)
    started = time.monotonic()

    def tell(name: str, problem: str | None) -> None:
        keep({name: problem})
        if problem is None:
            log.info(
                "the CPU kernel %r is ready after %.0f s (%d of %d)",
                name,
                time.monotonic() - started,
                names.index(name) + 1,
                len(names),
            )

    while left:
        verdicts |= _run_child(left, child, settings, timeout_s, tell)
        left = [name for name in left if name not in verdicts]
    return verdicts


def _run_child(
    names: Sequence[str],
    child: Sequence[str],
    environment: Mapping[str, str],
    timeout_s: float,
    tell: Callable[[str, str | None], None],
) -> Verdicts:
    """The verdicts of one child: of all kernels, or up to the one that ended it.

    tell  is called with the verdict of each as soon as it is known
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [sys.executable, *child, *names],
                env=environment,
                stdin=subprocess.PIPE,  # it closes with this process, and the child ends then
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process: no verdict on a kernel
            )
        except OSError as error:
            problem = f"could not be tried ({error})"
            for name in names:
                tell(name, problem)
            return dict.fromkeys(names, problem)
        with process:
            try:
                verdicts, hangs = _listen(process, timeout_s, tell)
            finally:  # also where this process is asked to stop meanwhile
                process.kill()
        if len(verdicts) < len(names):
            failed = next(name for name in names if name not in verdicts)
            how = f"did not finish within {timeout_s:g} s" if hangs else _how_it_ended(process)
            verdicts[failed] = how + ("" if hangs else _last_words(errors))
            tell(failed, verdicts[failed])
    return verdicts


def _listen(
    child: subprocess.Popen[str], timeout_s: float, tell: Callable[[str, str | None], None]
) -> tuple[Verdicts, bool]:
    """The verdicts that a child prints, a line each, and whether it fell silent."""
    assert child.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
    verdicts: Verdicts = {}
    while True:
        try:
            line = lines.get(timeout=timeout_s)
        except queue.Empty:
            return verdicts, True
        if line is None:
            child.wait(timeout=timeout_s)
            return verdicts, False
        name, problem = json.loads(line)
        verdicts[name] = problem
        tell(name, problem)


def _forward(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _how_it_ended(child: subprocess.Popen[str]) -> str:
    code = child.returncode
    if code >= 0:
        return f"ended its trial process with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"ended its trial process with {name}"


def _last_words(errors: IO[bytes]) -> str:
    """What tells most of what a process that died has written: LLVM's error, or the last line."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    told = [line for line in lines if line.startswith("LLVM ERROR")] or lines[-1:]
    return f" ({told[0][:200]})" if told else ""


@contextmanager
def _alone(folder: Path | None) -> Iterator[None]:
    """Hold the cache's lock, so that processes that start together compile once."""
    if folder is None:
        yield
        return
    lock = FileLock(folder / "trial.lock")
    try:
        lock.acquire(timeout=len(NAMES) * TIMEOUT_S)
    except (Timeout, OSError, NotImplementedError):  # a disk without locks: compile beside others
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _path(folder: Path | None) -> Path | None:
    return None if folder is None else folder / VERDICTS


def _read(path: Path | None) -> Verdicts:
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    sound = isinstance(found, dict) and all(it is None or type(it) is str for it in found.values())
    return found if sound else {}


def _write(path: Path | None, verdicts: Verdicts) -> None:
    """Keep the verdicts, but for those of a process that was ended from outside."""
    if path is None:
        return
    kept = {
        name: problem
        for name, problem in verdicts.items()
        if problem is None or not any(signal_name in problem for signal_name in FROM_OUTSIDE)
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        part.write_text(json.dumps(kept, indent=1, sort_keys=True))
        part.replace(path)
    except OSError as error:
        log.debug("the verdicts are not kept: %s", error)
