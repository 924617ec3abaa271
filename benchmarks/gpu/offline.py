"""Compile kernels for a GPU that is not there: the launches a caller makes become compilations.

Triton needs no device to produce machine code. With `compiling` active, every ``kernel[grid](...)``
specialises on its arguments exactly as on a GPU, is compiled down to SASS for the chosen
architecture, and is not run. Needs ``TRITON_INTERPRET`` unset when triton is first imported.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.gpu.cases import Place, Sizes
from benchmarks.gpu.scope import FULL
from benchmarks.gpu.shapes import LLAMA_8B
from benchmarks.gpu.specs import all_specs


@dataclass(frozen=True)
class Compiled:
    """One specialisation. Bytes a program for shared memory, a thread for spills."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    cubin: bytes


class OfflineDriver:
    """The questions triton asks a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("nothing runs here")


@contextmanager
def without_device(arch: int, after: Callable[[Any], None]) -> Iterator[None]:
    """Within, launches end where a kernel for ``sm_<arch>`` is ready to run. `after` gets it."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter compiles nothing")
    original, driver = JITFunction.run, triton.runtime.driver._active
    fresh: set[Any] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self not in fresh:  # what was compiled for another architecture counts for none
            fresh.add(self)
            self.device_caches.clear()
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        after(kernel)
        return kernel

    triton.runtime.driver.set_active(OfflineDriver(arch))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original
        triton.runtime.driver.set_active(driver)
        for function in fresh:
            function.device_caches.clear()


@contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Within, launches are compiled for ``sm_<arch>`` and collected, not run."""
    found: dict[str, Compiled] = {}
    result: list[Compiled] = []

    def take(kernel: Any) -> None:
        if kernel.hash not in found:
            found[kernel.hash] = describe(kernel)
            result.append(found[kernel.hash])

    with without_device(arch, take):
        yield result


def describe(kernel: Any) -> Compiled:
    """Registers and spills from ptxas, run again on the kernel's PTX."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, out = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(kernel.asm["ptx"])
        name = re.search(r"\.target (\w+)", kernel.asm["ptx"])
        assert name is not None
        assembler = tool("ptxas-blackwell" if kernel.metadata.target.arch >= 100 else "ptxas")
        command = [assembler, "-v", f"--gpu-name={name[1]}", str(ptx), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        registers = re.search(r"Used (\d+) registers", done.stderr)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert registers is not None
        assert spills is not None
        return Compiled(
            kernel.metadata.name,
            int(registers[1]),
            int(spills[1]) + int(spills[2]),
            kernel.metadata.shared,
            kernel.metadata.num_warps,
            out.read_bytes(),
        )


def tool(name: str) -> str:
    """A program of NVIDIA's toolkit that comes with triton."""
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def sweep(arch: int, *, few: bool = False) -> Iterator[tuple[str, Compiled]]:
    """Every specialisation that the benchmark's cases need at Llama-3-8B shapes, with its case."""
    codecs = FULL.codecs[:1] if few else FULL.codecs
    groups = LLAMA_8B.groups()[1:2] if few else LLAMA_8B.groups()
    sizes = Sizes(rows=4, variants=(2,), length=64, prefill_rows=128)
    place = Place(torch.device("cpu"), torch.bfloat16)
    seen = 0
    with compiling(arch) as found:
        for spec in all_specs(LLAMA_8B, codecs, sizes, groups):
            spec.make(place).run()
            for compiled in found[seen:]:
                yield spec.name, compiled
            seen = len(found)


def table(arch: int, *, few: bool = False) -> Iterator[str]:
    """CSV lines of a sweep."""
    for name, c in sweep(arch, few=few):
        kernel = c.name.strip("_").removesuffix("_kernel")
        case = name.replace(",", ";")
        numbers = f"{c.registers},{c.spilled_bytes},{c.shared_bytes},{c.warps}"
        yield f"sm_{arch},{kernel},{case},{numbers}"


def main() -> None:
    """Compile every case at Llama-3-8B shapes; print what ptxas says, as CSV."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument(
        "--arch", type=int, nargs="+", default=[90], help="compute capabilities, 80 to 120"
    )
    arguments.add_argument("--few", action="store_true", help="4 bit and one group only")
    chosen = arguments.parse_args()
    print(f"# triton {triton.__version__}; registers and spilled bytes a thread, shared a program")
    print("arch,kernel,case,registers,spilled,shared,warps")
    for arch in chosen.arch:
        for line in table(arch, few=chosen.few):
            print(line, flush=True)


if __name__ == "__main__":
    main()
