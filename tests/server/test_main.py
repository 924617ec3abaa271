"""``impart-serve`` as a process of its own: mistakes first, what start-up says, how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.process.inputs import may_have_gpu
from server.process.listen import bind, close
from tests.server.conftest import PAIR, Served

ROOT = Path(__file__).resolve().parents[2]
# As the console script, and in the end what of the heavy libraries was imported.
PROGRAM = """
import atexit, sys
heavy = ("torch", "transformers", "numpy", "numba", "fastapi")
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules)))
from server.__main__ import main
main()
"""
IMPORTED_NOTHING = "imported:\n"
GENEROUS_S = 15.0  # where a second is usual: the machine may be busy


def started(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("IMPART_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str) -> tuple[int, str, str]:
    with started(arguments) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@contextmanager
def until_said(arguments: Sequence[str], words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has written a line with these words, and what it wrote up to there."""
    with started(arguments) as process:
        try:
            said = ""
            assert process.stderr is not None
            for line in process.stderr:
                said += line
                if words in line:
                    break
            yield process, said
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--base", "BASE", "--port", "70000"], "port must be at most 65535"),
        (["--base", "BASE", "--log-level", "loud"], "log_level must be one of"),
        (["--base", "/nowhere"], "the base: /nowhere: no such directory"),
        (["--base", "org/name"], "the base: org/name: no such directory here"),
        (["--base", "BASE", "--deltas", "/nowhere"], "the deltas: /nowhere cannot be read"),
        (
            ["--base", "BASE", "--state-dir", "/dev/null/x"],
            "the ledger: /dev/null/x/ledger.db cannot",
        ),
        (["--base", "BASE", "--ledger-url", "nosuch://u:p@h/d"], "nosuch has no driver here"),
        (["--base", "BASE", "--max-model-len", "4096"], "has positions for 512 tokens only"),
        (["--base", "BASE", "--device", "cpu", "--kernels", "triton"], "use kernels auto"),
        (
            ["--base", "BASE", "--device", "cpu", "--kv-cache-bytes", "9TiB"],
            "kv_cache_bytes is 9TiB, but this process may take no more than",
        ),
    ],
)
def test_mistake_is_said_in_a_line_with_status_2_before_torch_is_imported(
    tiny_llama: Path, arguments: list[str], says: str
) -> None:
    given = [str(tiny_llama) if argument == "BASE" else argument for argument in arguments]
    status, out, err = run(*given, *([] if "--port" in given else ["--port", "0"]))
    assert status == 2, err
    assert says in err
    assert "Traceback" not in err
    assert out == IMPORTED_NOTHING


def test_port_in_use_is_said_before_torch_is_imported_and_soon(tiny_llama: Path) -> None:
    sockets = bind("127.0.0.1", 0)  # as another server that still loads
    try:
        port = sockets[0].getsockname()[1]
        before = time.monotonic()
        status, out, err = run("--base", str(tiny_llama), "--port", str(port))
        seconds = time.monotonic() - before
    finally:
        close(sockets)
    assert status == 2
    assert err == (
        f"impart-serve: the server cannot listen on 127.0.0.1 port {port}: another process uses "
        "it; stop that one or choose another --port\n"
    )
    assert out == IMPORTED_NOTHING
    assert seconds < GENEROUS_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_loading_ends_with_a_line_and_status_0(
    tiny_llama: Path, number: signal.Signals
) -> None:
    arguments = ["--base", str(tiny_llama), "--port", "0", "--device", "cpu"]
    with until_said(arguments, "has 108,864 parameters") as (process, _):
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"{number.name} came before the server was ready; the process ends" in err
    assert "Traceback" not in err


def test_version_is_printed_without_a_base() -> None:
    status, out, _ = run("--version")
    assert (status, out.partition(" ")[0]) == (0, "impart-serve")


def test_kv_cache_beyond_a_cpu_that_was_found_is_refused_before_the_base_is_loaded(
    tiny_llama: Path,
) -> None:
    """With --device auto only torch can tell that a GPU's driver finds no GPU."""
    status, out, err = run("--base", str(tiny_llama), "--port", "0", "--kv-cache-bytes", "9000TiB")
    assert status == 2, err
    assert "lower" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out == IMPORTED_NOTHING or may_have_gpu()


def test_startup_says_base_device_variants_and_last_the_address(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    pair = served("llama", PAIR)
    deltas = Path(shutil.copytree(pair.deltas, tmp_path / "deltas"))
    for n in range(7):
        (deltas / f"empty{n}").mkdir()
    arguments = ["--base", str(pair.base), "--deltas", str(deltas), "--port", "0"]
    arguments += ["--device", "cpu", "--kernels", "torch", "--kv-cache-bytes", "8MiB"]
    with until_said(arguments, "listens on") as (process, said):
        url = said.split()[-1]
        assert httpx.get(f"{url}/health/ready", timeout=20).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)

    told = (
        "the base base has 108,864 parameters in float32",
        "the server loads the base onto the CPU",
        "the server uses the torch kernels",
        "2 of 9 variants in",
        "variants cannot be served: empty0 (NotADelta: ",
        "the server computes with",
        f"the server listens on {url}",
    )
    positions = [said.index(words) for words in told]
    assert positions == sorted(positions)
    assert "empty4 (" in said
    assert "empty5" not in said
    assert "; and 2 more" in said
    assert process.returncode == 0, rest
    with socket.socket() as one:  # the port is free again
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", int(url.rpartition(":")[2])))
