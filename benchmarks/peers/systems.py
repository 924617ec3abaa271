"""How each compared system is started, and what is known about it beforehand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.cells import BASE, variant_names
from benchmarks.peers.errors import PeersError
from benchmarks.peers.variants import first_variants
from compressor.usable_cpus import usable_cpus

ROOT = Path(__file__).resolve().parents[2]
OUR_SLOTS = 64  # the server's default for --max-resident-variants
VLLM_KV_GIB = 1  # as much as our server's default
MAX_CPU_LORAS_IN_STEP = 32  # no more than requests in flight


@dataclass(frozen=True, slots=True)
class Site:
    """Where things are, and the settings that all systems share.

    dir          virtual environments and variants: see `setup` and `variants`
    concurrency  requests in flight, and the most sequences of a batch
    max_len      longest prompt plus output
    preload      libraries for vLLM's LD_PRELOAD, separated by colons
    """

    base: Path
    dir: Path
    concurrency: int
    max_len: int
    preload: str = ""

    def python(self, peer: str) -> str:
        """The interpreter of a peer's environment. Raises PeersError if there is none."""
        path = self.dir.absolute() / peer / "bin" / "python"
        if not path.exists():
            raise PeersError(f"{peer} is not installed: python -m benchmarks.peers.setup {peer}")
        return str(path)

    def variants(self, form: str, count: int) -> Path:
        """A directory with `count` variants of one form. Raises PeersError."""
        return first_variants(self.dir.absolute() / "variants", form, count)


Command = Callable[[Site, int, int], list[str]]


@dataclass(frozen=True, slots=True)
class System:
    """One compared system.

    form      what it serves as a variant, a directory of `variants`
    command   of the server: site, number of variants, port
    packages  whose versions are recorded
    is_lazy   variants get memory on first use; otherwise at the start, or never
    alone     can serve the base alone
    """

    form: str
    command: Command
    packages: tuple[str, ...]
    is_lazy: bool = False
    alone: bool = True


def _ours(site: Site, count: int, port: int) -> list[str]:
    command = [sys.executable, "-m", "server", "--base", str(site.base), "--port", str(port)]
    command += ["--served-base-name", BASE]
    if count:
        command += ["--deltas", str(site.variants("deltas", count))]
        command += ["--max-resident-variants", str(max(OUR_SLOTS, count))]
    return command


def _static(peer: str, form: str) -> Command:
    def command(site: Site, count: int, port: int) -> list[str]:
        python = [site.python(peer), "-m", "benchmarks.peers.static_server", "--kind", peer]
        options = ["--base", str(site.base), "--base-name", BASE, "--port", str(port)]
        options += ["--max-batch", str(site.concurrency)]
        if count:
            options += ["--variants", str(site.variants(form, count))]
        return [*_environment(PYTHONPATH=str(ROOT)), *python, *options]

    return command


def _vllm(site: Site, count: int, port: int) -> list[str]:
    settings = _environment(
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE=str(VLLM_KV_GIB),
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS=str(usable_cpus().cpus),  # left alone it serves with one
        **({"LD_PRELOAD": site.preload} if site.preload else {}),
    )
    command = [site.python("vllm"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(site.base), "--served-model-name", BASE, "--port", str(port)]
    command += ["--max-num-seqs", str(site.concurrency), "--max-model-len", str(site.max_len)]
    if count:
        folder = site.variants("adapters", count)
        command += ["--enable-lora", "--max-lora-rank", "32", "--max-cpu-loras", str(count)]
        command += ["--max-loras", str(min(count, MAX_CPU_LORAS_IN_STEP)), "--lora-modules"]
        command += [f"{name}={folder / name}" for name in variant_names(count)]
    return [*settings, *command]


def _environment(**settings: str) -> list[str]:
    settings["HF_HUB_OFFLINE"] = "1"
    return ["env", *(f"{name}={value}" for name, value in settings.items())]


OURS = "ours"
SYSTEMS = {
    OURS: System("deltas", _ours, ("torch", "transformers"), is_lazy=True),
    "transformers": System(
        "checkpoints", _static("transformers", "checkpoints"), ("transformers", "torch")
    ),
    "peft": System(
        "adapters", _static("peft", "adapters"), ("peft", "transformers", "torch"), alone=False
    ),
    "vllm": System("adapters", _vllm, ("vllm-cpu", "transformers", "torch")),
}


def versions(site: Site, name: str) -> str:
    """Versions of a system's packages in its own environment. Raises PeersError."""
    packages = SYSTEMS[name].packages
    code = "import sys, importlib.metadata as m; print(*(m.version(p) for p in sys.argv[1:]))"
    python = sys.executable if name == OURS else site.python(name)
    found = [*map(" ".join, zip(packages, _output([python, "-c", code, *packages]), strict=True))]
    if name == "vllm" and site.preload:
        found.append("preloaded " + " ".join(Path(lib).name for lib in site.preload.split(":")))
    return ", ".join(found)


def _output(command: Sequence[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeersError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout.split()
