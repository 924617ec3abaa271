"""Tiny checkpoints stored quantised, and what they mean, both written from the formats' own pages.

A packer here rounds to nearest and puts every element where its format wants it, one by one; a
reader takes every element back out, one by one. Neither shares a line with the project's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Scheme:
    """One format: what it says in config.json, how a matrix is packed and how it is read."""

    config: dict[str, Any]
    pack: Callable[[str, Tensor], Parts]
    unpack: Callable[[str, Parts], Tensor]


def quantise(base: Path, out: Path, scheme: Scheme, dtype: str = "float16") -> Path:
    """Write `base` with every linear layer but lm_head as `scheme` stores it."""
    shutil.copytree(base, out)
    tensors: Parts = {}
    for name, value in load_file(base / "model.safetensors").items():
        if is_packed(name):
            tensors |= scheme.pack(name, value.float())
        else:
            tensors[name] = value.to(getattr(torch, dtype))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {"dtype": dtype, "quantization_config": scheme.config}
    (out / "config.json").write_text(json.dumps(config))
    return out


def dense_twin(quantised: Path, out: Path, scheme: Scheme) -> Path:
    """Write the dense model that `quantised` stands for."""
    shutil.copytree(quantised, out)
    config = json.loads((quantised / "config.json").read_text())
    del config["quantization_config"]
    dtype = getattr(torch, config["dtype"])
    (out / "config.json").write_text(json.dumps(config))
    stored = load_file(quantised / "model.safetensors")
    dense = {name: value for name, value in stored.items() if not is_packed(name)}
    for name in matrices(stored):
        dense[name] = scheme.unpack(name, stored).to(dtype)
    save_file(dense, out / "model.safetensors")
    return out


def is_packed(name: str) -> bool:
    return "_proj." in name and not name.endswith(".bias")


def matrices(stored: Parts) -> list[str]:
    """Dense names of the packed matrices."""
    modules = {name[: name.index("_proj.") + 5] for name in stored if is_packed(name)}
    return sorted(f"{module}.weight" for module in modules)


# --- integers in words ----------------------------------------------------------------------------


def to_words(values: list[int], bits: int) -> list[int]:
    """A stream of bits, lowest first, in signed 32-bit words."""
    n_words = -(-len(values) * bits // 32)
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    words = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(n_words)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def from_words(words: list[int], bits: int, index: int) -> int:
    first = bits * index // 32
    two = sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words[first : first + 2]))
    return (two >> (bits * index - 32 * first)) & ((1 << bits) - 1)


def int32(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def rounded(
    weight: Tensor, groups: list[int], bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]`` from 0, zeros and float16 scales ``[out, groups]``, to nearest."""
    n_groups, top = max(groups) + 1, (1 << bits) - 1
    which = torch.tensor(groups)
    zeros, scales = (torch.empty(weight.shape[0], n_groups) for _ in range(2))
    for group in range(n_groups):
        part = weight[:, which == group]
        if symmetric:
            scales[:, group] = 2 * part.abs().amax(1) / top
            zeros[:, group] = 1 << (bits - 1)
        else:
            low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
            scales[:, group] = (high - low) / top
            zeros[:, group] = (-low / scales[:, group]).round().clamp(1, top)
    scales = scales.half().float()
    codes = (weight / scales[:, which] + zeros[:, which]).round().clamp(0, top)
    return codes.int(), zeros.int(), scales.half()


def in_order(n_in: int, group: int) -> list[int]:
    return [i // group for i in range(n_in)]


def by_activation(n_in: int, group: int) -> list[int]:
    """Groups as act-order leaves them: no two neighbours in one."""
    generator = torch.Generator().manual_seed(n_in)
    order = torch.randperm(n_in, generator=generator).tolist()
    groups = [0] * n_in
    for place, column in enumerate(order):
        groups[column] = place // group
    return groups


# --- GPTQ and AWQ ---------------------------------------------------------------------------------


def gptq(bits: int, *, version: int = 1, act_order: bool = False, symmetric: bool = True) -> Scheme:
    group = 16
    grouping = by_activation if act_order else in_order
    minus = 1 if version == 1 else 0

    def pack(name: str, weight: Tensor) -> Parts:
        groups = grouping(weight.shape[1], group)
        codes, zeros, scales = rounded(weight, groups, bits, symmetric)
        module = name.removesuffix(".weight")
        top = (1 << bits) - 1
        stored = [[(z - minus) & top for z in column] for column in zeros.T.tolist()]
        parts = {
            "qweight": int32([to_words(row, bits) for row in codes.tolist()]).T,
            "qzeros": int32([to_words(row, bits) for row in stored]),
            "scales": scales.T,
            "g_idx": torch.tensor(groups, dtype=torch.int32),
        }
        return {f"{module}.{part}": value for part, value in parts.items()}

    def unpack(name: str, parts: Parts) -> Tensor:
        module = name.removesuffix(".weight")
        qweight, qzeros = (parts[f"{module}.{p}"].tolist() for p in ("qweight", "qzeros"))
        scales, groups = (parts[f"{module}.{p}"].tolist() for p in ("scales", "g_idx"))
        dense = torch.empty(len(scales[0]), len(groups), dtype=torch.float64)
        for o in range(dense.shape[0]):
            words = [row[o] for row in qweight]
            zeros = [(from_words(row, bits, o) + minus) % (1 << bits) for row in qzeros]
            for i, group_ in enumerate(groups):
                dense[o, i] = (from_words(words, bits, i) - zeros[group_]) * scales[group_][o]
        return dense.float()

    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order,
        "sym": symmetric, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip
    return Scheme(config, pack, unpack)


def awq() -> Scheme:
    group = 16

    def words_of(row: list[int]) -> list[int]:
        return [to_words([row[k + AWQ_ORDER[j]] for j in range(8)], 4)[0]
                for k in range(0, len(row), 8)]  # fmt: skip

    def pack(name: str, weight: Tensor) -> Parts:
        codes, zeros, scales = rounded(weight, in_order(weight.shape[1], group), 4, False)
        module = name.removesuffix(".weight")
        return {
            f"{module}.qweight": int32([words_of(row) for row in codes.T.tolist()]),
            f"{module}.qzeros": int32([words_of(row) for row in zeros.T.tolist()]),
            f"{module}.scales": scales.T,
        }

    def unpack(name: str, parts: Parts) -> Tensor:
        module = name.removesuffix(".weight")
        qweight, qzeros, scales = (
            parts[f"{module}.{p}"].tolist() for p in ("qweight", "qzeros", "scales")
        )
        dense = torch.empty(len(scales[0]), len(qweight), dtype=torch.float64)
        for i, row in enumerate(qweight):
            for o in range(dense.shape[0]):
                place = AWQ_ORDER.index(o % 8)
                code = from_words([row[o // 8]], 4, place)
                zero = from_words([qzeros[i // group][o // 8]], 4, place)
                dense[o, i] = (code - zero) * scales[i // group][o]
        return dense.float()

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
              "zero_point": True}  # fmt: skip
    return Scheme(config, pack, unpack)


# --- compressed-tensors ---------------------------------------------------------------------------


def packed(bits: int, *, symmetric: bool = True, group: int | None = 16) -> Scheme:
    """Format pack-quantized: signed integers, stored plus half their range."""

    def pack(name: str, weight: Tensor) -> Parts:
        groups = in_order(weight.shape[1], group or weight.shape[1])
        codes, zeros, scales = rounded(weight, groups, bits, symmetric)
        module = name.removesuffix(".weight")
        parts = {
            f"{module}.weight_packed": int32([to_words(row, bits) for row in codes.tolist()]),
            f"{module}.weight_shape": torch.tensor(weight.shape),
            f"{module}.weight_scale": scales.bfloat16(),
        }
        if not symmetric:
            columns = int32([to_words(column, bits) for column in zeros.T.tolist()])
            parts[f"{module}.weight_zero_point"] = columns.T
        return parts

    def unpack(name: str, parts: Parts) -> Tensor:
        module = name.removesuffix(".weight")
        words = parts[f"{module}.weight_packed"].tolist()
        rows, columns = parts[f"{module}.weight_shape"].tolist()
        scales = parts[f"{module}.weight_scale"].tolist()
        dense = torch.empty(rows, columns, dtype=torch.float64)
        for o in range(rows):
            for i in range(columns):
                which, zero = i // (group or columns), 1 << (bits - 1)
                if not symmetric:
                    column = parts[f"{module}.weight_zero_point"][:, which].tolist()
                    zero = from_words(column, bits, o)
                dense[o, i] = (from_words(words[o], bits, i) - zero) * scales[o][which]
        return dense.float()

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group,
               "strategy": "group" if group else "channel"}  # fmt: skip
    return Scheme(compressed("pack-quantized", weights), pack, unpack)


def compressed(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip
