"""Compile on all cores what the other sections are going to launch, into triton's own cache.

One after the other some 170 kernels take minutes of a run that has ten. The
sections are walked through on the CPU with launches noted instead of run (`launches`, in several
processes), and what was noted is compiled by others (`compiled`). What triton's cache goes by -
source, signature, what arguments are divisible by, options, architecture - is the same there as on
the device, so that the sections find it; what was not foreseen they compile themselves.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.gpu.cases import Place
from benchmarks.gpu.decoder_section import steps
from benchmarks.gpu.disk import folder_on_disk
from benchmarks.gpu.engine import make_engine
from benchmarks.gpu.engine_section import make_ready
from benchmarks.gpu.offline import without_device
from benchmarks.gpu.random_model import write_random_delta
from benchmarks.gpu.report import Report
from benchmarks.gpu.scope import Scope
from benchmarks.gpu.shapes import Codec
from benchmarks.gpu.specs import spec_parts
from server.ops.kernels import TorchKernels
from server.ops.selfcheck import check_kernels
from server.ops.triton.kernels import TritonKernels

CPU = torch.device("cpu")
LARGE = 1 << 16  # values; what is smaller is computed as usual, indices above all
VOCABULARY = 1024  # no kernel here sees how large it is


@dataclass(frozen=True)
class Job:
    """One kernel to compile: what triton was going to, as plain data that another process takes."""

    module: str
    name: str
    target: GPUTarget
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]


def compiled(job: Job) -> str:
    """Compile one job, unless triton's cache has it; the kernel's key in it."""
    function = getattr(importlib.import_module(job.module), job.name)
    source = ASTSource(function, job.signature, job.constants, job.attributes)
    kernel = triton.compile(source, target=job.target, options=job.options)
    return str(kernel.hash)


@contextmanager
def noting(arch: int) -> Iterator[list[Job]]:
    """Within, launches for ``sm_<arch>`` become jobs, each once; nothing is compiled or run."""
    jobs: list[Job] = []
    seen: set[tuple[str, str, str]] = set()
    original = JITFunction._do_compile

    def note(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any,
        attributes: Any, warmup: bool,
    ) -> None:  # fmt: skip
        target = GPUTarget("cuda", arch, 32)
        module, name = self.fn.__module__, self.fn.__qualname__
        if (module, name, key) not in seen:
            seen.add((module, name, key))
            made_of = signature, constants, attributes, dict(options.__dict__)
            jobs.append(Job(module, name, target, *made_of))

    JITFunction._do_compile = note
    try:
        with without_device(arch, lambda kernel: None):
            yield jobs
    finally:
        JITFunction._do_compile = original


class Skipping(TorchFunctionMode):
    """Leaves out what takes a CPU long and no kernel's signature depends on: filling large arrays,
    the base's products.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            made = args[0].new_empty(*args[0].shape[:-1], len(args[1]))
            return made.zero_() if len(args[1]) == VOCABULARY else made  # logits must be finite
        if function in (torch.randn, torch.rand, torch.randint) and "device" in kwargs:
            shape = args[2:] if function is torch.randint else args
            made = torch.empty(*shape, **kwargs)
            if made.numel() >= LARGE:
                return made
        return function(*args, **kwargs)


class Switched:
    """Kernels that are torch's at first: what checks the model's fused forms computes with them."""

    def __init__(self) -> None:
        self.inner: Any = TorchKernels()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def walks(scope: Scope) -> dict[str, Callable[[], object]]:
    """By name, what makes a section's launches on the CPU, those of the first sections first. An
    8-bit base adds few to its codec's.
    """
    here = replace(
        scope,
        shape=replace(scope.shape, layers=1, vocab=VOCABULARY),
        device=CPU,
        n_steps=1,
        copy_bytes=LARGE,
    )
    found: dict[str, Callable[[], object]] = {
        "engine": partial(_engine, here, scope.served[0]),
        "check": partial(_check, scope),
    }
    for part in spec_parts(scope.shape, scope.codecs, scope.sizes):
        found[f"kernels-{part}"] = partial(_specs, scope, part)
    for number, codec in enumerate(scope.served[1:], 2):
        found[f"engine-{number}"] = partial(_engine, here, codec)
    found["decoder"] = partial(_decoder, here)
    return found


def launches(scope: Scope, name: str, arch: int) -> list[Job]:
    """Of one of `walks`."""
    with noting(arch) as jobs:
        walks(scope)[name]()
    return jobs


def _check(scope: Scope) -> None:
    with suppress(ValueError):  # nothing was computed, so all is wrong
        check_kernels(TritonKernels(CPU), CPU, scope.dtype)


def _specs(scope: Scope, part: str) -> None:
    place = Place(CPU, scope.dtype)
    with Skipping():
        for spec in spec_parts(scope.shape, scope.codecs, scope.sizes)[part]:
            spec.make(place).run()


def _engine(scope: Scope, codec: Codec) -> None:
    kernels = Switched()
    with folder_on_disk() as folder:
        artifact = folder / "delta"
        write_random_delta(scope.shape, codec, artifact)
        engine = make_engine(scope, kernels=kernels)
        kernels.inner = TritonKernels(CPU)
        with Skipping():
            make_ready(engine, artifact)
        engine.core.stop()


def _decoder(scope: Scope) -> None:
    with Skipping(), redirect_stdout(io.StringIO()):  # its times are none
        steps(scope, Report(None), scope.served[0])
