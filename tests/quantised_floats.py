"""As `tests.quantised`, for matrices of float8, int8 and of 4-bit tables."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from tests.quantised import Parts, Scheme, compressed

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
       0.0, -0.0052083333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25)  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOAT8_MAX = 448.0


def float8_value(byte: int) -> float:
    """E4M3: a sign, four bits of exponent with bias 7, three of fraction; no infinities."""
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    assert byte & 127 != 127, "not a number"
    size = math.ldexp(fraction, -9) if not exponent else math.ldexp(8 + fraction, exponent - 10)
    return -size if sign else size


def float8(block: tuple[int, int] | None, config: dict[str, Any], scale_name: str) -> Scheme:
    """Float8 with a scale for each block; `block` None: one of the whole matrix."""

    def sizes(weight: Tensor) -> tuple[int, int]:
        rows, columns = block or weight.shape
        return min(rows, weight.shape[0]), min(columns, weight.shape[1])

    def pack(name: str, weight: Tensor) -> Parts:
        rows, columns = sizes(weight)
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        for r in range(scales.shape[0]):
            for c in range(scales.shape[1]):
                place = (slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns))
                scales[r, c] = weight[place].abs().max() / FLOAT8_MAX
                stored[place] = (weight[place] / scales[r, c]).to(torch.float8_e4m3fn)
        scales = scales if block else scales.reshape(())
        return {name: stored, f"{name}{scale_name}": scales}

    def unpack(name: str, parts: Parts) -> Tensor:
        stored = parts[name].view(torch.uint8).tolist()
        weight, scales = parts[name], parts[f"{name}{scale_name}"]
        rows, columns = sizes(weight)
        scales = scales.reshape(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        grid = scales.tolist()
        return torch.tensor(
            [
                [float8_value(byte) * grid[o // rows][i // columns] for i, byte in enumerate(row)]
                for o, row in enumerate(stored)
            ],
            dtype=torch.float64,
        ).float()

    return Scheme(config, pack, unpack)


def deepseek(block: tuple[int, int]) -> Scheme:
    config = {"quant_method": "fp8", "weight_block_size": list(block),
              "activation_scheme": "dynamic", "fmt": "e4m3"}  # fmt: skip
    return float8(block, config, "_scale_inv")


def float8_tensor() -> Scheme:
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    return float8(None, compressed("float-quantized", weights), "_scale")


def int8_rows(config: dict[str, Any], scale: str, top: float, divided: bool) -> Scheme:
    """Int8 with a scale a row: compressed-tensors' channels, or bitsandbytes' largest values."""

    def pack(name: str, weight: Tensor) -> Parts:
        scales = weight.abs().amax(1, keepdim=True) / top
        codes = (weight / scales).round().clamp(-127, 127).to(torch.int8)
        if divided:
            scales = (scales * top).flatten()
        return {name: codes, f"{name.removesuffix('.weight')}.{scale}": scales}

    def unpack(name: str, parts: Parts) -> Tensor:
        scales = parts[f"{name.removesuffix('.weight')}.{scale}"].flatten().tolist()
        rows = parts[name].tolist()
        by = torch.tensor(1 / 127, dtype=torch.float32) if divided else torch.tensor(1.0)
        wide = torch.tensor(
            [[code * scales[o] for code in row] for o, row in enumerate(rows)], dtype=torch.float64
        )
        return wide.float() * by

    return Scheme(config, pack, unpack)


def compressed_int8() -> Scheme:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    return int8_rows(compressed("int-quantized", weights), "weight_scale", 127.0, divided=False)


def bitsandbytes_int8() -> Scheme:
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return int8_rows(config, "SCB", 127.0, divided=True)


def bitsandbytes(kind: str, *, nested: bool) -> Scheme:
    """4-bit indices, two a byte, the first in the upper half; scales of 32 elements each."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    block, nested_block, offset = 32, 64, 0.25

    def pack(name: str, weight: Tensor) -> Parts:
        flat = weight.flatten()
        absmax = flat.unflatten(0, (-1, block)).abs().amax(1)
        codes = (flat / absmax.repeat_interleave(block)).unsqueeze(1).sub(table).abs().argmin(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16",
                                 "shape": list(weight.shape)}  # fmt: skip
        parts = {
            name: (codes[0::2] * 16 + codes[1::2]).to(torch.uint8).unsqueeze(1),
            f"{name}.quant_map": table.clone(),
            f"{name}.absmax": absmax,
        }
        if nested:
            levels = torch.linspace(-1, 1, 256)
            off = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % nested_block))
            largest = off.unflatten(0, (-1, nested_block)).abs().amax(1)
            scaled = (off / largest.repeat_interleave(nested_block))[: len(absmax)]
            parts[f"{name}.absmax"] = (
                scaled.unsqueeze(1).sub(levels).abs().argmin(1).to(torch.uint8)
            )
            parts |= {f"{name}.nested_quant_map": levels, f"{name}.nested_absmax": largest}
            state |= {"nested_blocksize": nested_block, "nested_offset": offset}
        text = json.dumps(state).encode()
        parts[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text)).byte()
        return parts

    def unpack(name: str, parts: Parts) -> Tensor:
        text = bytes(parts[f"{name}.quant_state.bitsandbytes__{kind}"].tolist())
        rows, columns = json.loads(text)["shape"]
        data, values = parts[name].flatten().tolist(), parts[f"{name}.quant_map"]
        dense = torch.empty(rows * columns)
        for place in range(rows * columns):
            code = data[place // 2] >> 4 if place % 2 == 0 else data[place // 2] & 15
            scale = parts[f"{name}.absmax"][place // block]
            if nested:
                level = parts[f"{name}.nested_quant_map"][int(scale)]
                scale = level * parts[f"{name}.nested_absmax"][place // block // nested_block]
                scale = scale + offset
            dense[place] = values[code] * scale
        return dense.reshape(rows, columns)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
              "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}  # fmt: skip
    return Scheme(config, pack, unpack)


def pack_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and exponents of ``[experts, in, out]``: 32 inputs share a power of two."""
    turned = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = turned.abs().amax(-1).clamp(min=1e-6).log2().floor().sub(2).int()
    table = torch.tensor(E2M1 + tuple(-value for value in E2M1))
    scaled = torch.ldexp(turned, -exponents.unsqueeze(-1))
    codes = scaled.unsqueeze(-1).sub(table).abs().argmin(-1)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return blocks.contiguous(), (exponents + 127).to(torch.uint8)


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    n_experts, n_out, n_groups, _ = blocks.shape
    dense = torch.empty(n_experts, 32 * n_groups, n_out)
    for expert in range(n_experts):
        for o in range(n_out):
            for i in range(32 * n_groups):
                byte = int(blocks[expert, o, i // 32, i % 32 // 2])
                code = byte & 15 if i % 2 == 0 else byte >> 4
                size = math.ldexp(E2M1[code & 7], int(scales[expert, o, i // 32]) - 127)
                dense[expert, i, o] = -size if code >> 3 else size
    return dense
