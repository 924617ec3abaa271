"""Compiled kernels take over from torch's while streams run, or torch goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.kernel_swap import SwapRefused
from server.model.reconstructed import products_of
from server.ops.cpu.kernels import NumbaKernels
from server.ops.cpu.term_table import TermCall
from server.ops.linear import LinearOp, TorchLinear
from server.ops.norm import rms_norm
from tests.server.conftest import PAIR, Served
from tests.server.helpers import CoreHarness, Recorded

PROMPT = list(range(3, 40))
Make = Callable[..., CoreHarness]


class OtherLinear(TorchLinear):
    """Of a compiled kernel, for all that a swap can tell."""


class Compiled(NumbaKernels):
    """Whose products can be told from torch's, where they are those."""

    makes: Callable[[Tensor], LinearOp] = OtherLinear

    def linear(self, weight: Tensor) -> LinearOp:
        return type(self).makes(weight)


class WrongProducts(Compiled):
    makes = staticmethod(lambda weight: OtherLinear(1.1 * weight))


class Swapping:
    """An engine that began without compiled kernels, stepped here while the swap runs beside it."""

    def __init__(
        self, make: Make, directory: Served, kind: type[NumbaKernels] = Compiled, **settings: Any
    ) -> None:
        self.kernels = NumbaKernels(usable=(), awaited=True)
        self.compiled = kind(parallel=self.kernels.parallel)
        self.kernels.compiled = lambda: self.compiled  # type: ignore[method-assign]
        settings = {"self_check": True} | settings
        self.engine = make(directory, kernels=self.kernels, **settings)
        self.swap = self.engine.swap
        self.products = products_of(self.engine.core._runner.base.model)
        self.error: BaseException | None = None

    def run(self, *streams: Recorded) -> None:
        """The whole swap, while the streams go on as far as they get."""
        thread = threading.Thread(target=self._run)
        thread.start()
        self.engine.until(lambda: not thread.is_alive())
        assert not any(stream.error for stream in streams)

    def _run(self) -> None:
        try:
            self.swap.run()
        except BaseException as error:
            self.error = error

    def resident(self, *names: str) -> None:
        for name in names:
            self.engine.run(self.engine.submit(name, "x", max_tokens=1))

    def on(self, op: type) -> bool:
        return all(type(product.linear) is op for product in self.products)


@pytest.mark.parametrize("self_check", [True, False])
def test_swap_streams_and_variants_go_on_to_the_same_tokens(
    served: Callable[..., Served], harness: Make, self_check: bool
) -> None:
    directory = served("llama", PAIR)
    names = ["base", *PAIR]
    swapping = Swapping(harness, directory, self_check=self_check)
    engine = swapping.engine
    assert engine.core.stats().kernel_state == "compiling"
    swapping.resident(*names[1:])
    before = [engine.submit(name, PROMPT) for name in names]
    engine.run(*before)
    assert swapping.on(TorchLinear)

    streams = [engine.submit(name, PROMPT, max_tokens=200, ignore_eos=True) for name in names]
    swapping.run(*streams)
    assert swapping.error is None
    assert swapping.on(OtherLinear)
    assert engine.core.stats().kernel_state == "compiled"
    assert swapping.kernels.in_use == swapping.compiled.in_use
    after = [engine.submit(name, PROMPT) for name in names]  # with prefixes from before the swap
    engine.run(*streams, *after)
    for stream, old, new in zip(streams, before, after, strict=True):
        assert new.output_ids == old.output_ids == stream.output_ids[: len(old.output_ids)]
    engine.assert_idle()


def test_swap_reconstructed_weights_are_laid_out_too(
    served: Callable[..., Served], harness: Make
) -> None:
    swapping = Swapping(harness, served("llama", PAIR), mode="reconstruct")
    swapping.resident("blockdiag")
    old = [product.reconstructed[0].dense() for product in swapping.products]
    swapping.run()
    assert swapping.error is None
    for product, weight in zip(swapping.products, old, strict=True):
        assert type(product.reconstructed[0]) is OtherLinear
        assert torch.equal(product.reconstructed[0].dense(), weight)


def wrong_rows(swapping: Swapping) -> None:
    def off(x: Tensor, weights: Tensor, index: Tensor | None, form: Any) -> Tensor:
        return 1.1 * rms_norm(x, weights, index, form)

    rows = swapping.compiled._rows
    assert rows is not None
    swapping.compiled._rows = SimpleNamespace(  # type: ignore[assignment]
        rms_norm=off, add_rms_norm=rows.add_rms_norm, silu_mul=rows.silu_mul
    )


def wrong_terms(swapping: Swapping) -> None:
    kernel = swapping.compiled._terms[torch.float32]
    inner = kernel.add_

    def off(y: Tensor, x: Tensor, terms: TermCall) -> None:
        inner(y, x, terms)
        y.mul_(1.5)

    kernel.add_ = off  # type: ignore[method-assign]
    swapping.resident("blockdiag")


def wrong_product(swapping: Swapping) -> None:
    swapping.compiled = WrongProducts(parallel=swapping.kernels.parallel)


def broken_compilation(swapping: Swapping) -> None:
    def fails() -> NumbaKernels:
        raise OSError("no child")

    swapping.kernels.compiled = fails  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (wrong_rows, SwapRefused, "with the base alone and the compiled kernels"),
        (wrong_terms, SwapRefused, "with resident variants and the compiled kernels"),
        (wrong_product, SwapRefused, "the compiled product of"),
        (broken_compilation, OSError, "no child"),
    ],
)
def test_swap_that_differs_or_fails_leaves_torch_at_work(
    served: Callable[..., Served],
    harness: Make,
    spoil: Callable[[Swapping], None],
    error: type[Exception],
    says: str,
) -> None:
    swapping = Swapping(harness, served("llama", PAIR))
    engine = swapping.engine
    spoil(swapping)
    before = engine.submit("base", PROMPT)
    engine.run(before)
    swapping.run()
    assert isinstance(swapping.error, error)
    assert says in str(swapping.error)
    assert swapping.on(TorchLinear)
    assert engine.core.stats().kernel_state == "uncompiled"
    after = engine.submit("base", PROMPT)
    engine.run(after)
    assert after.output_ids == before.output_ids


def test_swap_in_bfloat16_lays_out_the_products_that_the_kernels_have(
    served: Callable[..., Served], harness: Make
) -> None:
    swapping = Swapping(harness, served("llama", PAIR), NumbaKernels, dtype="bfloat16")
    weights = [product.linear.dense() for product in swapping.products]
    swapping.resident("blockdiag")
    swapping.run()
    assert swapping.error is None
    for product, weight in zip(swapping.products, weights, strict=True):
        assert type(product.linear) is type(swapping.compiled.linear(weight))
        assert torch.equal(product.linear.dense(), weight)
        for parameter in product.parameters_in_order:
            assert parameter.base.shape == parameter.shape
    swapping.resident("impart")


def test_swap_of_an_engine_that_ends_is_given_up(
    served: Callable[..., Served], harness: Make
) -> None:
    swapping = Swapping(harness, served("llama", PAIR))
    thread = threading.Thread(target=swapping._run)
    thread.start()  # nobody steps
    swapping.swap.close()
    thread.join(60)
    assert not thread.is_alive()
    assert swapping.on(TorchLinear)


def test_swap_is_not_begun_where_no_kernels_are_awaited(
    served: Callable[..., Served], harness: Make
) -> None:
    engine = harness(served("llama", PAIR), kernels=NumbaKernels(usable=()))
    engine.swap.start()
    assert engine.swap._thread.ident is None
