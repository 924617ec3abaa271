"""Just enough of an OpenAI-compatible server around static batches, for `benchmarks.load`.

    python -m benchmarks.peers.static_server --kind transformers --base BASE --variants DIR --port N

One thread generates. Between batches it waits until no request has come for `SETTLE_S`, so that
the clients of the batch that just ended are all back, then takes the request that waited longest
and with it every other that may share its batch: any (adapters), or those of the same variant
(checkpoints). Tokens are sent step by step as `generate` makes them, so the time to the first
token includes the wait for the batches before, the swap, and the prefill.

Text is token ids in decimal: nothing is detokenised.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.static_models import KINDS, Request, StaticModel
from compressor.usable_cpus import product_threads

SETTLE_S = 0.02


class Batcher:
    """Queue of requests, and the batches made of it."""

    def __init__(self, model: StaticModel, max_batch: int) -> None:
        self.model = model
        self._max_batch = max_batch
        self._waiting: list[Request] = []
        self._changed = threading.Condition()

    def submit(self, request: Request) -> None:
        """Queue a request; its tokens come through its `events`."""
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()

    def run(self) -> None:
        """Serve forever."""
        while True:
            self.step()

    def step(self) -> None:
        """Wait for a batch and generate it; a failure goes to each of its requests."""
        batch = self._take()
        try:
            self.model.generate(batch)
        except Exception as error:
            for request in batch:
                request.events.put(error)

    def _take(self) -> list[Request]:
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            while self._changed.wait(SETTLE_S):
                """Another one came: wait again."""
            first = self._waiting[0].model
            batch = [r for r in self._waiting if self.model.mixes or r.model == first]
            batch = batch[: self._max_batch]
            taken = {id(request) for request in batch}
            self._waiting = [r for r in self._waiting if id(r) not in taken]
            return batch


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: the end of the connection ends the stream."""

    server: StaticServer

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {})
        elif self.path == "/v1/models":
            names = self.server.batcher.model.names
            self._json(200, {"object": "list", "data": [{"id": name} for name in names]})
        else:
            self._error(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] not in self.server.batcher.model.names:
            return self._error(404, f"The model `{body['model']}` does not exist.")
        if not (body.get("stream") and body.get("ignore_eos") and body.get("temperature") == 0):
            return self._error(400, "only stream, ignore_eos and temperature 0 are served")
        request = Request(body["model"], body["prompt"], body["max_tokens"])
        self.server.batcher.submit(request)
        return self._stream(request)

    def _stream(self, request: Request) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        n_tokens = 0
        while (event := request.events.get()) is not None:
            if isinstance(event, Exception):
                message = f"{type(event).__name__}: {event}"
                return self._event({"error": {"message": message}})
            n_tokens += 1
            self._event({"choices": [{"index": 0, "text": f"{event} "}]})
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": n_tokens}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "code": status}})

    def _json(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """One line per request would only cost time."""


class StaticServer(ThreadingHTTPServer):
    """A thread per connection, one more for the batches."""

    daemon_threads = True
    request_queue_size = 256  # the standard library's 5 drops part of a burst for a second

    def __init__(self, port: int, model: StaticModel, max_batch: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.batcher = Batcher(model, max_batch)
        threading.Thread(target=self.batcher.run, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--base-name", default="base")
    parser.add_argument("--variants", type=Path, help="directory of checkpoints or adapters")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--threads", type=int, help="of torch; default: as our server's")
    args = parser.parse_args(argv)
    torch.set_num_threads(product_threads(args.threads).count)
    folders = sorted(args.variants.iterdir()) if args.variants else []
    variants = {folder.name: folder for folder in folders}
    model = KINDS[args.kind](args.base, args.base_name, variants)
    with StaticServer(args.port, model, args.max_batch) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
