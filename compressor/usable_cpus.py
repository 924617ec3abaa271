"""How many CPUs this process may use, and how many threads follow from that.

The host's number says little: a container with a limit of 2 CPUs on 64 cores runs 64 threads 32
times slower each, and those that wait for each other slower still. What counts:

    CPU affinity      taskset, cpusets, Kubernetes' static policy
    cgroup limit      docker run --cpus, Kubernetes' limits (`cgroups`)
    physical cores    for products: siblings of a core share its units, so a second one adds waiting
    PYTHON_CPU_COUNT  Python 3.13's own limit (also -X cpu_count), meant for containers. It is read
                      the same way under every Python. A limit like the others: it only narrows

Who wants other numbers of threads says so: --torch-threads, then OMP_NUM_THREADS, then
MKL_NUM_THREADS. Read anew at every call: affinity and limits may change. Imports nothing but the
standard library, because BLAS and OpenMP read their variables when they are loaded
(`set_thread_defaults` comes before torch and numpy).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from compressor.cgroups import cpu_quota

# Threads of products; torch's own number is that of its OpenMP.
PRODUCT_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",  # numpy's: it starts them when it is imported
    "VECLIB_MAXIMUM_THREADS",  # macOS
    "NUMBA_NUM_THREADS",
)
WORK_VARIABLES = ("RAYON_NUM_THREADS",)  # tokenizers
USER_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# What `set_thread_defaults` settled on, beside the variables: for this process and its children,
# which could not tell otherwise whether the user set them.
CHOSEN = "IMPART_CHOSEN_THREADS"
_SYSCTL_S = 5.0


@dataclass(frozen=True, slots=True)
class UsableCpus:
    """Two numbers, for two kinds of threads.

    cores   for products: siblings of one core count once
    cpus    for work that shares nothing: decoding, entropy coding, tokenising
    reason  what decides the number of cores, for people
    """

    cores: int
    cpus: int
    reason: str

    def within(self, limit: int | None, reason: str) -> UsableCpus:
        """At most `limit` of both."""
        if limit is None or limit >= self.cpus:
            return self
        narrowed = replace(self, cores=min(self.cores, limit), cpus=limit)
        return replace(narrowed, reason=reason) if limit < self.cores else narrowed


@dataclass(frozen=True, slots=True)
class Threads:
    """As text ``2 threads (cgroup limit)``."""

    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.count} thread{'s' if self.count > 1 else ''} ({self.reason})"


def usable_cpus(
    root: Path = Path("/"),
    affinity: Collection[int] | None = None,
    environ: Mapping[str, str] | None = None,
) -> UsableCpus:
    """What this process may use. Never fails: what cannot be read limits nothing.

    root      of /proc, /sys and the cgroups' mounts
    affinity  default: this process's; systems without one count all CPUs
    """
    if affinity is None and hasattr(os, "sched_getaffinity"):
        affinity = os.sched_getaffinity(0)
    found = _without_affinity() if affinity is None else _by_affinity(root, affinity)
    found = found.within(cpu_quota(root), "cgroup limit")
    return found.within(_python_limit(environ), "PYTHON_CPU_COUNT")


def product_threads(
    given: int | None = None,
    environ: Mapping[str, str] | None = None,
    usable: UsableCpus | None = None,
) -> Threads:
    """Threads for matrix products. given: --torch-threads."""
    environ = os.environ if environ is None else environ
    if given is not None:
        return Threads(given, "--torch-threads")
    count, _, reason = environ.get(CHOSEN, "").partition(" ")
    if chosen := _positive(count):
        return Threads(chosen, reason)
    for name in USER_VARIABLES:
        # OpenMP takes a list, one number for each level of nesting.
        if wanted := _positive(environ.get(name, "").partition(",")[0]):
            return Threads(wanted, name)
    usable = usable or usable_cpus(environ=environ)
    return Threads(usable.cores, usable.reason)


def set_thread_defaults(
    given: int | None = None,
    environ: MutableMapping[str, str] | None = None,
    usable: UsableCpus | None = None,
) -> Threads:
    """Set the variables that the user left unset; returns `product_threads`.

    For the start of a program, before torch and numpy are imported. Torch's inter-op pool has no
    variable and needs none: it starts when TorchScript forks, which nothing here does.
    """
    environ = os.environ if environ is None else environ
    usable = usable or usable_cpus(environ=environ)
    threads = product_threads(given, environ, usable)
    for name in PRODUCT_VARIABLES:
        environ.setdefault(name, str(threads.count))
    for name in WORK_VARIABLES:
        environ.setdefault(name, str(usable.cpus))
    environ[CHOSEN] = f"{threads.count} {threads.reason}"
    return threads


def _by_affinity(root: Path, affinity: Collection[int]) -> UsableCpus:
    folder = root / "sys/devices/system/cpu"
    online = _cpu_list(_read(folder / "online")) or set(affinity)
    core_of = {cpu: _core(folder, cpu) for cpu in online.union(affinity)}
    cores = _count_cores(affinity, core_of)
    if cores < _count_cores(online, core_of):
        reason = "CPU affinity"
    else:
        reason = "physical cores" if any(core_of.values()) else "logical CPUs"
    return UsableCpus(cores, len(affinity) or 1, reason)


def _count_cores(cpus: Iterable[int], core_of: Mapping[int, frozenset[int]]) -> int:
    """A CPU of which nothing is known is a core of its own."""
    return len({core_of[cpu] or frozenset([cpu]) for cpu in cpus}) or 1


def _core(folder: Path, cpu: int) -> frozenset[int]:
    """The CPUs that share a core with `cpu`, itself included; empty if nothing says so."""
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the older name
        if siblings := _cpu_list(_read(folder / f"cpu{cpu}" / "topology" / name)):
            return frozenset(siblings)
    return frozenset()


def _without_affinity() -> UsableCpus:
    """On macOS and Windows."""
    cpus = os.cpu_count() or 1
    cores = _mac_cores() if sys.platform == "darwin" else None
    if cores is None:
        return UsableCpus(cpus, cpus, "logical CPUs")
    return UsableCpus(min(cores, cpus), cpus, "physical cores")


def _mac_cores() -> int | None:
    import subprocess  # for this alone

    command = ["sysctl", "-n", "hw.physicalcpu"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SYSCTL_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return _positive(done.stdout)


def _python_limit(environ: Mapping[str, str] | None) -> int | None:
    environ = os.environ if environ is None else environ
    option = sys._xoptions.get("cpu_count")
    return _positive(environ.get("PYTHON_CPU_COUNT", "") if option is None else str(option))


def _positive(text: str) -> int | None:
    """The number, or None for what is none above 0."""
    match = re.fullmatch(r"\s*0*([1-9][0-9]{0,8})\s*", text)
    return int(match[1]) if match else None


def _cpu_list(text: str) -> set[int]:
    """{0, 1, 2, 8} from ``0-2,8``; empty if it is no such list."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            cpus.update(range(int(first), int(last or first) + 1))
        except ValueError:
            return set()
    return cpus


def _read(path: Path) -> str:
    """A file that need not exist."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
