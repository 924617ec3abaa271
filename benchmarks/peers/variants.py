"""Distinct variants of one base in every form that is compared, made cheaply.

    python -m benchmarks.peers.variants --base BASE --finetuned A --finetuned B --count 128

deltas       each fine-tune compressed once by the default codec; every further one has the codes
             of all its terms shuffled (same sizes, same settings, other contents everywhere),
             written and hashed by the compressor's own writer
adapters     PEFT LoRAs of random factors over every linear layer
checkpoints  links to the fine-tunes in turn: a swap reads as many bytes whatever they are, but the
             page cache holds two checkpoints, not N, which favours the system that swaps

What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.peers.cells import DEFAULT_DIR, variant_names
from benchmarks.peers.errors import PeersError
from compressor.artifact.reader import Artifact, read_artifact
from compressor.artifact.writer import ArtifactWriter
from compressor.codecs import Term
from compressor.codecs.blockdiag import BlockDiagTerm, blockdiag_from_codes
from compressor.codecs.lowrank import Factor, LowRankTerm
from compressor.codecs.packing import pack_bits
from compressor.codecs.quantize import QUANT_BITS
from compressor.codecs.rows import RowsTerm, rows_from_codes
from compressor.compress.options import NO_CODER, Options
from compressor.compress.pipeline import compress

CODEC = "auto"
RATIO = 64.0
RANK = 32
FACTORS: tuple[Factor, ...] = ("a", "b")
FORMS = ("deltas", "adapters", "checkpoints")


def make_deltas(
    base: Path,
    finetuned: Sequence[Path],
    out: Path,
    count: int,
    ratio: float = RATIO,
    codec: str = CODEC,
) -> None:
    """Write `count` artifacts of distinct contents to `out`."""
    # Codes in any order are no longer what a coder expects; without one all sizes are equal.
    options = Options(codec=codec, ratio=ratio, entropy=NO_CODER)
    real: list[Artifact] = []
    for index, name in enumerate(variant_names(count)):
        path = out / name
        if index < len(finetuned):
            if not path.exists():
                compress(base, finetuned[index], path, options)
            real.append(read_artifact(path))
        elif not path.exists():
            _write_shuffled(real[index % len(real)], path, seed=index)


def _write_shuffled(artifact: Artifact, path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with ArtifactWriter(path, run_key=f"shuffled {artifact.digest} {seed}") as writer:
        for delta in artifact.tensors:
            # Drawn for the staged ones too, so that a run taken up again gives the same bytes.
            terms = tuple(_shuffled(term, generator) for term in delta.terms)
            if writer.reuse(delta.name) is None:
                writer.add(replace(delta, terms=terms))
        config = replace(artifact.config, seed=seed, finetuned=f"shuffled {seed}", fidelity={})
        writer.finish(config, artifact.aux)


def _shuffled(term: Term, generator: torch.Generator) -> Term:
    def shuffled(codes: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(codes.numel(), generator=generator)
        return codes.flatten()[order].view(codes.shape)

    if isinstance(term, BlockDiagTerm):
        form = term.n_blocks, term.bits, shuffled(term.codes), term.scales, term.unit
        return blockdiag_from_codes(term.shape, *form, term.scale_bits)
    if isinstance(term, RowsTerm):
        codes = shuffled(term.codes)
        return rows_from_codes(term.shape, term.bits, term.index, codes, term.scales, term.unit)
    if isinstance(term, LowRankTerm) and term.bits in QUANT_BITS:
        parts = {name: _shuffled_factor(term, name, shuffled) for name in FACTORS}
        return replace(term, stored=term.stored | parts)
    raise PeersError(f"cannot shuffle codec {term.codec}; compress with auto or blockdiag")


def _shuffled_factor(
    term: LowRankTerm, name: Factor, shuffled: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    if term.in_columns(name):  # whole bytes of codes
        return shuffled(term.stored[name])
    return pack_bits(shuffled(term.codes(name)).flatten(), term.bits)


def make_adapters(base: Path, out: Path, count: int, rank: int = RANK) -> None:
    """Write `count` random LoRAs of rank `rank` in the base's dtype to `out`."""
    shapes = list(_linears(base))
    if not shapes:
        raise PeersError(f"{base} holds no linear layers in safetensors files")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.name),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name, _, _ in shapes}),
    }
    for index, name in enumerate(variant_names(count)):
        folder = out / name
        if (folder / "adapter_config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_factors(shapes, rank, seed=index), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _factors(
    shapes: Sequence[tuple[str, tuple[int, int], torch.dtype]], rank: int, seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns), dtype in shapes:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        up = torch.randn(rows, rank, generator=generator) * 0.01
        tensors[f"{module}.lora_A.weight"] = down.to(dtype)
        tensors[f"{module}.lora_B.weight"] = up.to(dtype)
    return tensors


def _linears(base: Path) -> Iterator[tuple[str, tuple[int, int], torch.dtype]]:
    """Names, shapes ``[out, in]`` and dtypes of the linear layers inside the blocks."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                shape = tensors.get_slice(name).get_shape()
                if ".layers." in name and len(shape) == 2:
                    yield name, (shape[0], shape[1]), tensors.get_tensor(name).dtype


def link_checkpoints(finetuned: Sequence[Path], out: Path, count: int) -> None:
    """Make `count` names for the fine-tunes, in turn."""
    out.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(variant_names(count)):
        if not (out / name).exists():
            (out / name).symlink_to(finetuned[index % len(finetuned)].resolve())


def first_variants(folder: Path, form: str, count: int) -> Path:
    """A directory of the first `count` variants of one form; files are hard links where possible.

    Raises PeersError if there are not so many.
    """
    missing = [name for name in variant_names(count) if not (folder / form / name).exists()]
    if missing:
        raise PeersError(
            f"{folder / form} lacks {missing[0]} and {len(missing) - 1} more: run "
            f"python -m benchmarks.peers.variants --count {count}"
        )
    out = folder / "served" / f"{form}-{count}"
    for name in variant_names(count):
        source, target = folder / form / name, out / name
        if target.exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.resolve())
        else:
            shutil.copytree(source, target, copy_function=_link)
    return out


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def mean_disk_bytes(folder: Path) -> int:
    """Bytes of a directory of variants over their number."""
    variants = list(folder.iterdir())
    files = (file for variant in variants for file in variant.resolve().rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file()) // len(variants)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.variants", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--finetuned", type=Path, action="append", required=True)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--ratio", type=float, default=RATIO)
    parser.add_argument("--codec", choices=("auto", "blockdiag"), default=CODEC)
    parser.add_argument("--rank", type=int, default=RANK)
    args = parser.parse_args(argv)
    out = args.dir / "variants"
    make_deltas(args.base, args.finetuned, out / "deltas", args.count, args.ratio, args.codec)
    make_adapters(args.base, out / "adapters", args.count, args.rank)
    link_checkpoints(args.finetuned, out / "checkpoints", args.count)
    for form in FORMS:
        n_bytes = mean_disk_bytes(out / form)
        print(f"{out / form}: {args.count} variants of {n_bytes / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
