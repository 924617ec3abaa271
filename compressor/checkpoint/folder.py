"""The directory of a model, adapter or delta: where it is, what is read of it, and whether it can.

Nothing here imports torch: a server says what is wrong with its paths before it loads anything.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compressor.checkpoint.gguf import converted_gguf, is_gguf
from compressor.checkpoint.hub import HubRef, fetch_artifact, fetch_files, fetch_settings, parse_ref
from compressor.checkpoint.quantised.settings import quantisation_of
from compressor.errors import CheckpointError
from compressor.readable import is_forbidden, why_unreadable

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = "adapter_config.json"
_DELTA = "delta_config.json"
# What is read of a directory, by us and by transformers.
_READ = ("*.json", "*.jinja", "*.model", "*.safetensors", "merges.txt", "vocab.txt", "SHA256SUMS")


def resolve(path: str | Path) -> Path:
    """Return the local directory of a model, adapter or delta given by path or by Hub id.

    From the Hub come the safetensors weights and the files beside them, nothing else. A GGUF file
    is converted to a directory on first use.
    """
    local = Path(path)
    if os.path.isdir(local):
        check_readable(local)
        return local
    if os.path.isfile(local) and is_gguf(local):
        return converted_gguf(local)
    if os.path.exists(local):
        raise CheckpointError(f"{path} is a file; give the directory that holds the model")
    if is_forbidden(local):
        raise CheckpointError(why_unreadable(local))
    ref = parse_ref(str(path))
    if ref is None:
        raise CheckpointError(
            f"{path}: no such directory, and not a Hub id such as org/name or org/name@revision"
        )
    folder = _fetched(ref)
    check_readable(folder)
    return folder


def _fetched(ref: HubRef) -> Path:
    folder = fetch_settings(ref)
    if (folder / _DELTA).is_file():
        return fetch_artifact(ref, folder)
    if (folder / _ADAPTER).is_file():
        fetch_files(ref, folder, ["adapter_model.safetensors"])
    else:
        read_model_config(folder)  # refused before its weights are fetched
        names = _shard_names(folder) if (folder / _INDEX).is_file() else [_SINGLE]
        fetch_files(ref, folder, names)
    return folder


def look_at_folder(path: str | Path) -> Path:
    """As `resolve`, and what is there must be an adapter, a delta or a whole model, as far as names
    of files tell.
    """
    folder = resolve(path)
    if not (folder / _ADAPTER).is_file() and not (folder / _DELTA).is_file():
        read_model_config(folder)
        weight_files(folder)
    return folder


def check_readable(folder: Path) -> None:
    """Raise CheckpointError if this process may not list a model's folder or read a file of it."""
    if (problem := why_unreadable(folder)) is not None:
        raise CheckpointError(problem)
    for file in sorted({file for pattern in _READ for file in folder.glob(pattern)}):
        if (problem := why_unreadable(file)) is not None:
            raise CheckpointError(problem)


def read_model_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` and refuse what only remote code could load, or nothing that is here."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no config.json; not a Hugging Face model: give the directory of one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); download the model again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; download the model again")
    if "auto_map" in config:
        raise CheckpointError(
            f"{file} has auto_map, which asks for code from the model's repository to be run; "
            "only architectures that transformers itself ships are supported. If this one is among "
            "them, take auto_map out of the file"
        )
    quantisation_of(config)
    return config


def weight_files(path: Path) -> list[Path]:
    """Return a model's safetensors files. CheckpointError if one is missing or there is none."""
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    if (path / _INDEX).is_file():
        return _sharded_files(path)
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{path} holds {pickled[0]}, a pickle, which can run code when it is read. Convert it "
            f'once where you trust it: python -c "from transformers import AutoModelForCausalLM '
            f"as M, AutoTokenizer as T; d, o = '{path}', '{path}-safetensors'; "
            f"M.from_pretrained(d, dtype='auto').save_pretrained(o); "
            f'T.from_pretrained(d).save_pretrained(o)"'
        )
    raise CheckpointError(
        f"{path}: neither {_SINGLE} nor {_INDEX} is there; download or save the weights"
    )


def _sharded_files(path: Path) -> list[Path]:
    names = _shard_names(path)
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: shard {name} is missing; download the model again")
    return [path / name for name in names]


def _shard_names(path: Path) -> list[str]:
    index = path / _INDEX
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} cannot be read ({error!r}); download the model again"
        ) from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name):
            raise CheckpointError(
                f"{index} names a shard outside its own directory, {name!r}; save the model again"
            )
    return names
