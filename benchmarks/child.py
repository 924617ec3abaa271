"""A server as a child process: start, wait until ready, watch its memory, stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx
import psutil

TAIL_LINES = 30
RSS_PERIOD_S = 0.2


class ChildError(RuntimeError):
    """The server did not start, or died."""


class ServerChild:
    """Runs `command` and expects it to serve `url`; its output goes to `log`.

    Use as a context manager: leaving it sends SIGTERM and waits for the drain. `folder` is where
    the command runs: with ``python -m server``, the checkout whose server it is. Our server begins
    when its kernels are compiled, unless `compile_kernels` says otherwise: what is measured is not
    torch.
    """

    def __init__(
        self,
        command: Sequence[str],
        url: str,
        log: Path,
        folder: Path | None = None,
        compile_kernels: str = "wait",
    ) -> None:
        self.command = list(command)
        self.url = url.rstrip("/")
        self.log = log
        self.folder = folder
        self.environment = {"IMPART_COMPILE_KERNELS": compile_kernels}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process. Refuses a port that already answers: that would be another server."""
        address = urlsplit(self.url)
        with socket.socket() as probe:
            if probe.connect_ex((address.hostname or "127.0.0.1", address.port or 80)) == 0:
                raise ChildError(f"something already listens at {self.url}; choose another port")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            # In a session of its own: Ctrl-C reaches us alone, and we stop the child in order.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        if self._process is None:
            raise ChildError("the server was not started")
        return self._process

    def wait_ready(self, timeout_s: float = 300.0) -> float:
        """Wait for ``/health/ready`` (or ``/health`` where there is no such path); return seconds.

        Raises ChildError with the end of the log if the process exits or the time runs out.
        """
        start = time.monotonic()
        with httpx.Client(base_url=self.url, timeout=5.0) as client:
            while time.monotonic() - start < timeout_s:
                if self.process.poll() is not None:
                    raise ChildError(
                        f"the server exited with {self.process.returncode}{self.tail()}"
                    )
                if _is_ready(client):
                    return time.monotonic() - start
                time.sleep(0.1)
        raise ChildError(f"the server was not ready after {timeout_s:.0f} s{self.tail()}")

    def rss_bytes(self) -> int:
        """Resident memory of the process and its children now."""
        try:
            root = psutil.Process(self.process.pid)
            return sum(p.memory_info().rss for p in (root, *root.children(recursive=True)))
        except psutil.NoSuchProcess:
            return 0

    def cpu_s(self) -> float:
        """CPU seconds the process has used so far."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def stop(self, timeout_s: float = 45.0) -> int:
        """SIGTERM, wait for the drain, then SIGKILL; return the exit status."""
        process = self.process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode

    def tail(self) -> str:
        """The last lines of the log, as the end of an error message."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return f"; the end of {self.log}:\n" + "\n".join(lines)


class PeakRss:
    """Samples a child's resident memory while the block runs; the largest is in `n_bytes`."""

    def __init__(self, child: ServerChild) -> None:
        self.n_bytes = 0
        self._child = child
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.n_bytes = max(self.n_bytes, self._child.rss_bytes())
            if self._stop.wait(RSS_PERIOD_S):
                return


def _is_ready(client: httpx.Client) -> bool:
    try:
        answer = client.get("/health/ready")
        if answer.status_code == 404:
            answer = client.get("/health")
    except httpx.TransportError:
        return False
    return answer.status_code == 200


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
