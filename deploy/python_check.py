"""Says in one line why a Python cannot run the project, before anything is installed.

`make` runs this with the interpreter it was told to use, so that also old ones must understand it.
"""

import platform
import shutil
import sys
import sysconfig

OLDEST, NEWEST = (3, 11), (3, 14)
WORKING = "Python 3.11, 3.12, 3.13 or 3.14"


def problem():
    """Return what this interpreter lacks and the remedy; None if nothing."""
    return _version() or _build() or _system() or _venv()


def _version():
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return None
    why = "" if sys.version_info[:2] < OLDEST else " (not all packages have builds for it yet)"
    minors = range(NEWEST[1], OLDEST[1] - 1, -1)
    which = getattr(shutil, "which", lambda name: None)  # Python 2 has none
    here = [name for name in map("python3.{}".format, minors) if which(name)]
    return "{} is Python {}{}; {} is needed: make PYTHON={}".format(
        sys.executable, platform.python_version(), why, WORKING, (here or ["python3.13"])[0]
    )


def _build():
    kind = platform.python_implementation()
    if kind == "CPython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    kind = "free-threaded " + kind if kind == "CPython" else kind
    return sys.executable + " is " + kind + "; CPython with its lock is needed: make PYTHON=..."


def _system():
    system, machine = platform.system(), platform.machine()
    musl = "musl" in (sysconfig.get_config_var("SOABI") or "")
    if system == "Linux" and machine in ("x86_64", "aarch64") and sys.maxsize > 2**32 and not musl:
        return None
    if system == "Darwin" and machine == "arm64":
        return None
    what = " ".join(filter(None, [system, machine, "musl" if musl else ""]))
    return (
        "torch has no builds for this Python's system ("
        + what
        + "); it has for Linux with glibc on x86_64 and aarch64, and for macOS on arm64"
    )


def _venv():
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return (
            sys.executable
            + " cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
        )
    return None


if __name__ == "__main__":
    sys.exit(problem())
