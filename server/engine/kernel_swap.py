"""Compiled kernels take over from torch while requests are served.

A server whose kernels were never compiled on this kind of machine begins with torch's products and
lets a thread of low priority do the rest, in this order:

1. The kernels are compiled and compared with torch in a child process, then loaded from its cache.
2. Product by product: the weights are laid out anew beside the steps, for they lie as a product
   wants them. The new product is compared with the old one on a few rows, and between two steps it
   takes its place. One product's weights are held twice meanwhile, no more.
3. The engine's self-check is repeated with all compiled kernels: against what the definition
   computed at start-up for the base, against the kernels in use for each resident variant. Its
   steps run one at a time between those of requests, in KV blocks of its own.
4. Between two steps the kernels are exchanged. What holds them (`Kernels.adopt`) stays.

So no request waits for longer than one step of the check, and what is served was checked. Where
something differs or fails, the products are laid out for torch again, and torch goes on.

KV blocks stay, those of cached prefixes too: both kinds of kernels compute what the definition does
but for rounding, as chunks of other lengths do, and a prefix is as exact as before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import torch

from server.deltas.background import lower_priority, make_background
from server.deltas.host_memory import trim_heap
from server.deltas.slots import Slot, SlotTable
from server.engine.check.compare import first_parting
from server.engine.check.selfcheck import Wanted
from server.engine.check.steps import CheckedSequence, Rows, kv_blocks_for, one_by_one
from server.engine.step.runner import Runner
from server.model.linear import Product
from server.model.reconstructed import ops_bytes, products_of
from server.ops.kernels import Kernels
from server.ops.linear import LinearOp
from server.ops.selfcheck import deviation, randoms

log = logging.getLogger(__name__)
T = TypeVar("T")
N_ROWS = 3  # of a product that are compared
FREED_BYTES = 64 << 20
N_TOGETHER = 2  # variants in one batch of the check: more would make its steps longer
WAIT_S = 0.5
# On cores that steps keep busy the child gets a quarter of one: as long as torch serves, every
# step takes longer than it will.
COMPILING_NICENESS = 5


class SwapRefused(Exception):
    """The compiled kernels compute something else; torch goes on."""


class _Closed(Exception):
    """The engine ends."""


class KernelSwap:
    """See the module's docstring.

    post    hands a command to the engine's thread, which runs it between steps
    wanted  what the self-check found; None where it is switched off
    """

    def __init__(
        self,
        runner: Runner,
        slots: SlotTable,
        post: Callable[[Callable[[], None]], None],
        wanted: Wanted | None,
    ) -> None:
        self._runner, self._slots, self._post, self._wanted = runner, slots, post, wanted
        self._kernels = runner.base.kernels
        self._longest_s = 0.0  # that a command has kept the steps waiting
        self._closed = threading.Event()
        # A daemon: the child that compiles ends when this process does.
        self._thread = threading.Thread(target=self._in_background, name="kernels", daemon=True)

    def start(self) -> None:
        """Begin; nothing is done where no kernels are awaited."""
        if self._kernels.state == "compiling":
            self._thread.start()

    def close(self) -> None:
        """Give up as soon as possible; what is under way in the child goes on without effect."""
        self._closed.set()

    def _in_background(self) -> None:
        lower_priority(COMPILING_NICENESS)
        started = time.monotonic()
        try:
            self.run()
        except _Closed:
            return
        except Exception:
            log.exception("the compiled kernels cannot take over: torch goes on, slower")
            return
        log.info(
            "the compiled kernels have taken over after %.0f s; no step waited longer than %.0f ms",
            time.monotonic() - started,
            1000 * self._longest_s,
        )

    def run(self) -> None:
        """All of it. Raises SwapRefused, or what went wrong; then all is as it was."""
        log.info("torch serves until the CPU kernels are compiled: slower, for a minute or two")
        try:
            compiled = self._kernels.compiled()
            make_background()
            self._lay_out(compiled)
            self._check(compiled)
        except _Closed:
            raise
        except Exception:
            self._lay_out(self._kernels, checked=False)
            self._between_steps(self._kernels.settle)
            raise
        self._between_steps(lambda: self._exchange(compiled))

    def _exchange(self, compiled: Kernels) -> None:
        self._kernels.adopt(compiled)
        self._kernels.settle()

    # -- weights -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _lay_out(self, kernels: Kernels, *, checked: bool = True) -> None:
        freed = 0
        for product in products_of(self._runner.base.model):
            if freed > FREED_BYTES:  # the allocator would keep them until the last
                trim_heap()
                freed = 0
            new = product.laid_out(kernels)
            if new is None or type(new) is type(product.linear):
                continue
            if checked:
                self._compare(product, new)
            self._between_steps(lambda product=product, new=new: product.use(new))  # type: ignore[misc]
            for slot, own in list(product.reconstructed.items()):
                new = kernels.linear(own.dense())
                self._between_steps(
                    lambda p=product, s=slot, old=own, new=new: p.exchange(s, old, new)  # type: ignore[misc]
                )
            freed += ops_bytes([product])
        trim_heap()

    def _compare(self, product: Product, new: LinearOp) -> None:
        weight = product.parameters_in_order[0]
        random, _ = randoms(torch.device("cpu"), weight.dtype)
        x = random(N_ROWS, weight.shape[1])
        with self._kernels.alone():
            problem = deviation(lambda _: new(x), self._kernels, lambda: product.linear(x), x.dtype)
        if problem is not None:
            raise SwapRefused(
                f"the compiled product of {weight.name} differs from torch's{problem}"
            )

    # -- the check -----------------------------------------------------------------------------

    def _check(self, compiled: Kernels) -> None:
        wanted = self._wanted
        if wanted is None:
            return
        alone = [CheckedSequence(wanted.longer, all_logits=True), CheckedSequence(wanted.shorter)]
        self._agree("the base alone", self._rows(compiled, alone), wanted.rows)
        residents = self._between_steps(self._hold_residents)
        try:
            for first in range(0, len(residents), N_TOGETHER):
                together = residents[first : first + N_TOGETHER]
                before, after = (
                    self._rows(
                        kernels, [CheckedSequence(wanted.shorter, slot.index) for slot in together]
                    )
                    for kernels in (None, compiled)
                )
                self._agree("resident variants", after, before)
        finally:
            self._between_steps(lambda: self._release(residents))

    def _agree(self, what: str, ours: Sequence[Rows], wanted: Sequence[Rows]) -> None:
        assert self._wanted is not None
        for mine, theirs in zip(ours, wanted, strict=True):
            parting = first_parting(mine, theirs, self._wanted.bounds)
            if parting is not None:
                raise SwapRefused(f"with {what} and the compiled kernels {parting}")

    def _rows(self, kernels: Kernels | None, sequences: list[CheckedSequence]) -> list[Rows]:
        """What these kernels (None: those in use) compute, a step at a time."""
        base = self._runner.base
        store = base.store.aside()
        block_tokens = base.store.block_tokens
        store.allocate(kv_blocks_for(sequences, block_tokens), block_tokens, base.device)
        steps = one_by_one(self._runner, sequences)

        def has_run() -> bool:
            with base.store.blocks_of(store), self._using(kernels), torch.no_grad():
                return next(steps, None) is not None

        while self._between_steps(has_run):
            pass
        return [sequence.rows() for sequence in sequences]

    @contextmanager
    def _using(self, kernels: Kernels | None) -> Iterator[None]:
        if kernels is None:
            yield
            return
        former = self._kernels.adopt(kernels)
        try:
            yield
        finally:
            self._kernels.adopt(former)

    def _hold_residents(self) -> list[Slot]:
        held = (self._slots.acquire(slot.key) for slot in self._slots.residents())
        return [slot for slot in held if slot is not None]

    def _release(self, residents: Sequence[Slot]) -> None:
        for slot in residents:
            self._slots.release(slot)

    # -- the engine's thread -------------------------------------------------------------------

    def _between_steps(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on the engine's thread. Raises _Closed if that ends."""
        done: Future[T] = Future()

        def command() -> None:
            started = time.perf_counter()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            self._longest_s = max(self._longest_s, time.perf_counter() - started)

        self._post(command)
        while True:
            try:
                return done.result(WAIT_S)
            except TimeoutError:
                if self._closed.is_set():
                    raise _Closed from None
