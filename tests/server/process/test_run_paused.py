"""A whole process that stands still for longer than its heartbeat, with the real engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

HEARTBEAT_S = 2.0
PROGRAM = """
import sys
from pathlib import Path
from server.engine.llm_engine import LLMEngine
from server.metrics.series import Metrics
from server.process.listeners import Listeners
from server.process.run import run, run_in_loop
from server.settings import Settings

settings = Settings(base=Path(sys.argv[2]), served_base_name="base", device="cpu",
    kernels="torch", dtype="float32", kv_cache_bytes=8 << 20,
    heartbeat_timeout_s=float(sys.argv[3]))
listener = __import__("socket").socket(fileno=int(sys.argv[1]))
metrics = Metrics()
engine = LLMEngine.from_settings(settings, metrics)
sys.exit(run_in_loop(run(engine, settings, metrics, Listeners([listener], []))))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="the system cannot stop a process")
def test_process_that_stood_still_longer_than_its_heartbeat_goes_on(tiny_llama: Path) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    arguments = [str(listener.fileno()), str(tiny_llama), str(HEARTBEAT_S)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        pass_fds=[listener.fileno()],
        stderr=subprocess.PIPE,
        text=True,
    )
    listener.close()
    try:
        assert httpx.get(f"{url}/health/ready", timeout=120).status_code == 200
        for _ in range(2):
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(2 * HEARTBEAT_S)
            os.kill(process.pid, signal.SIGCONT)
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        body = {"model": "base", "prompt": "x", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
        os.kill(process.pid, signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
        assert "died" not in log
    finally:
        process.kill()
        process.wait()
