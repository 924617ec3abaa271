"""Decode steps over buffers that never move, so that a CUDA graph can replay them.

A step is padded to a bucket of rows and filled into that bucket's `StaticBuffers`. The number of
variants is data there and no graph key: there are two graphs per bucket, with and without deltas.
On a CPU the same code runs without capture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from server.engine.step.static_buffers import DecodeRow, StaticBatch, StaticBuffers
from server.errors import ConfigError
from server.ops.row_mapping import BASE_SLOT

log = logging.getLogger(__name__)
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)

Forward = Callable[[StaticBatch, bool], Tensor]
GraphKey = tuple[int, bool]  # rows, with deltas


class StaticStep:
    """Runs decode steps: `forward` captured per bucket, with and without deltas.

    forward  ``(batch, with_deltas) -> logits [T, V]``. It reads what changes only from the batch
             (Python runs at capture, not at replay), allocates nothing that outlives it and never
             waits for the device. With `with_deltas` it applies whatever slots the batch names.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_rows: int,
        max_kv_blocks: int,
        device: torch.device,
        padding_row: int = -1,
    ) -> None:
        if max_rows > BUCKETS[-1]:
            raise ConfigError(
                f"{max_rows} decode rows per step are more than the largest graph's "
                f"{BUCKETS[-1]}; lower --max-num-seqs or use --enforce-eager"
            )
        self._forward = forward
        wanted = [bucket for bucket in BUCKETS if bucket < max_rows]
        sizes = [*wanted, BUCKETS[len(wanted)]]
        self._buffers = {t: StaticBuffers(t, max_kv_blocks, device, padding_row) for t in sizes}
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._warm: set[GraphKey] = set()  # whose kernels are compiled
        self._given_up: set[GraphKey] = set()
        self._pool: Any = None
        # One for all captures: cuBLAS keeps a workspace for every stream it has seen.
        self._side = torch.cuda.Stream() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.forget()

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(self._buffers)

    @property
    def max_rows(self) -> int:
        return self.buckets[-1]

    def prepare(self, *, with_deltas: Sequence[bool] = (False, True)) -> None:
        """Compile and capture everything: largest bucket first, so that the others share its
        memory. Call once the slot arrays and caches have their addresses. Does nothing on a CPU.
        """
        self.forget()
        if self._side is None:
            return
        for bucket in reversed(self.buckets):
            for flag in with_deltas:
                self._capture((bucket, flag))

    def forget(self, *, with_deltas_only: bool = False, new_kernels: bool = True) -> None:
        """Some array has moved: capture anew, each graph when it is first needed.

        with_deltas_only  it was one that steps of the base alone do not read
        new_kernels       there are arrays of another kind, whose kernels may not be compiled yet
        """
        self._graphs = {k: g for k, g in self._graphs.items() if with_deltas_only and not k[1]}
        self._given_up.clear()
        if new_kernels:
            self._warm.clear()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle() if self._side is not None else None

    def _capture(self, key: GraphKey) -> None:
        assert self._side is not None
        (bucket, with_deltas), side = key, self._side
        buffers = self._buffers[bucket]
        buffers.fill([])
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        if key not in self._warm:
            with torch.cuda.stream(side):  # compiles kernels and sets up cuBLAS before the capture
                self._forward(buffers.batch, with_deltas)
            current.wait_stream(side)
            self._warm.add(key)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may allocate and wait meanwhile, on its own stream. The
        # outer context gives this thread its stream back if the capture cannot be ended.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(
                graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
            ),
        ):
            logits = self._forward(buffers.batch, with_deltas)
        self._graphs[key] = graph, logits

    def _captured(self, key: GraphKey) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """The graph, captured if need be; None on a CPU, and where capturing failed."""
        if self._side is None or key in self._given_up:
            return None
        if key not in self._graphs:
            try:
                self._capture(key)
            except RuntimeError:  # memory; if the device is broken, the step itself will fail too
                log.exception(
                    "no graph of %d rows could be captured: such steps run eagerly", key[0]
                )
                self._given_up.add(key)
        return self._graphs.get(key)

    def runs_eagerly(self, n_rows: int, with_deltas: bool) -> bool:
        """Whether steps like the last of these are not captured although they should be."""
        return (self._bucket(n_rows), with_deltas) in self._given_up

    def _bucket(self, n_rows: int) -> int:
        return next(t for t in self.buckets if t >= n_rows)

    @torch.inference_mode()
    def run(self, rows: Sequence[DecodeRow], last_tokens: Tensor | None = None) -> Tensor:
        """Logits ``[n, V]`` of n rows sorted by slot; valid until the next call. `last_tokens`: see
        `StaticBuffers.fill`.
        """
        key = self._bucket(len(rows)), any(row.slot != BASE_SLOT for row in rows)
        captured, buffers = self._captured(key), self._buffers[key[0]]
        buffers.fill(rows, last_tokens)
        if captured is None:
            return self._forward(buffers.batch, key[1])[: len(rows)]
        graph, logits = captured
        graph.replay()
        return logits[: len(rows)]
