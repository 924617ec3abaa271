"""A GGUF file as a directory: dequantised once by transformers, and kept in the Hub's cache.

GGUF has its own names, orders and tokenizer; transformers converts all of them, for the whole model
at once. What comes out is an ordinary dense checkpoint, and a delta's base is that one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compressor.atomic import RunLock, publish_directory, recover_directory
from compressor.checkpoint.hub import hub_cache
from compressor.errors import CheckpointError, OutputError

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
SOURCE = "impart_source.json"  # beside the weights: what they were before
_MAGIC = b"GGUF"
_RULES = 1  # rises when other values, names or files come out
_FOLDER = "impart-gguf"
_PIECE_BYTES, _N_PIECES = 64 << 10, 256
_BITS = re.compile(r"gguf (?:I?Q|TQ|[A-Z]*FP)(\d)")  # Q4_K, IQ3_S, TQ1_0, MXFP4
_PLAIN = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}


def is_gguf(file: Path) -> bool:
    """Tell by its first bytes. Raises CheckpointError if the name says so and the bytes do not."""
    try:
        with file.open("rb") as stream:
            found = stream.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if file.suffix == SUFFIX and not found:
        raise CheckpointError(
            f"{file} is not a GGUF file, whatever its name says; download it again"
        )
    return found


def converted_gguf(file: Path) -> Path:
    """Return the directory of the dense model that `file` holds, which is made on first use.

    Raises CheckpointError if transformers cannot read it.
    """
    folder = hub_cache() / _FOLDER / _key(file) / file.stem
    if not (folder / "config.json").is_file():
        log.warning("%s is dequantised once and kept as %s", file, folder)
        convert_gguf(file, folder)
    return folder


def convert_gguf(file: Path, out: Path) -> None:
    """Write the dense model and the tokenizer to `out`, whole or not at all.

    In bfloat16, or the dtype of a file that is not quantised.
    """
    _check_libraries(file)
    types = _types(file)
    with _whole(out) as folder:
        try:
            _convert(file, folder, _dtype(types))
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
            first = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{file}: transformers cannot read this GGUF file ({type(error).__name__}: "
                f"{first}); give the original model's directory"
            ) from error
        text = f"{_text(types)}, dequantised to {_dtype(types)}"
        (folder / SOURCE).write_text(json.dumps({"quantisation": text}) + "\n")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` if the block succeeds and vanishes if not."""
    staged = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with RunLock(out):
            recover_directory(out)
            shutil.rmtree(staged, ignore_errors=True)
            try:
                staged.mkdir()
                yield staged
                for written in staged.iterdir():
                    with written.open("rb") as stream:
                        os.fsync(stream.fileno())
                publish_directory(staged, out)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error


def source_text(folder: Path) -> str | None:
    """What a directory's weights were before: ``gguf Q4_K, dequantised to bfloat16``, say."""
    try:
        text = json.loads((folder / SOURCE).read_bytes())["quantisation"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text[:100] if isinstance(text, str) and text.isprintable() else None


def source_bits(folder: Path) -> int | None:
    """Bits that most weights of a directory had before; None if they were not quantised."""
    found = _BITS.match(source_text(folder) or "")
    return int(found[1]) if found else None


def _convert(file: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
        **_dequantising(),
    )
    if found["missing_keys"]:
        raise ValueError(f"tensor {min(found['missing_keys'])} is missing")
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)


def _dequantising() -> dict[str, Any]:
    """Newer transformers leave weights in their blocks where a kernel for them is installed."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _check_libraries(file: Path) -> None:
    for name in ("gguf", "accelerate"):
        if find_spec(name) is None:
            raise CheckpointError(
                f"{file} is a GGUF file, and reading it needs the package {name}: "
                "pip install 'impart-serve[gguf]'"
            )


def _types(file: Path) -> Counter[str]:
    """Bytes of each type of tensor."""
    import gguf

    types: Counter[str] = Counter()
    try:
        for tensor in gguf.GGUFReader(file).tensors:
            types[tensor.tensor_type.name] += int(tensor.n_bytes)
    except Exception as error:  # the library checks little, and raises what numpy raises
        raise CheckpointError(
            f"{file} is not a complete GGUF file ({type(error).__name__}); download it again"
        ) from error
    return types


def _dtype(types: Counter[str]) -> str:
    if types.keys() <= {"F32"}:
        return "float32"
    return "float16" if types.keys() <= {"F32", "F16"} else "bfloat16"


def _text(types: Counter[str]) -> str:
    packed = Counter({name: count for name, count in types.items() if name not in _PLAIN})
    return f"gguf {(packed or types).most_common(1)[0][0]}"


def _key(file: Path) -> str:
    """Of the file's contents, by samples, and of what converts it."""
    digest = hashlib.sha256(f"{_RULES} {version('transformers')} ".encode())
    try:
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"{size}\n".encode())
            last = max(0, size - _PIECE_BYTES)
            for start in sorted({i * last // (_N_PIECES - 1) for i in range(_N_PIECES)}):
                digest.update(os.pread(stream.fileno(), _PIECE_BYTES, start))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]
