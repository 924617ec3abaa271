"""Find matrices of float8 or int8 values with scales, and those of 4-bit tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from compressor.checkpoint.quantised.forms import Form, LookupForm, Mxfp4Form, ScaledForm
from compressor.checkpoint.quantised.integers import find_packed
from compressor.checkpoint.quantised.parts import FLOAT8, FLOATS, Parts, blocks_of
from compressor.checkpoint.quantised.settings import (
    Quantisation,
    block_size,
    group_size,
    weight_groups,
)
from compressor.errors import CheckpointError

_SCALES = (*FLOATS, "F8_E8M0", "U8")  # the last two: powers of two
_ONE_BYTE = (*FLOAT8, "I8")
_OF_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".activation_scale",
                   ".k_scale", ".v_scale", ".q_scale", ".input_scale_ub")  # fmt: skip
_BY_ROW = b"\0"  # bitsandbytes' other orders are of kernels that it no longer has
_MAX_SIZE = 1 << 31


def find_fp8(parts: Parts, quantisation: Quantisation) -> Iterator[tuple[str, Form]]:
    """DeepSeek's blocks (``weight_scale_inv``, which is multiplied with too) and one scale a tensor
    or row (``weight_scale``).
    """
    block = block_size(quantisation.options, "weight_block_size")
    for module in parts.ending(".weight"):
        if parts.stored[f"{module}.weight"].dtype in FLOAT8:
            inverse = f"{module}.weight_scale_inv"
            scale = inverse if inverse in parts.stored else f"{module}.weight_scale"
            yield _scaled(parts, module, scale, block)
    parts.drop(*_OF_ACTIVATIONS)


def find_compressed(parts: Parts, quantisation: Quantisation) -> Iterator[tuple[str, Form]]:
    """The formats pack-quantized, float-quantized, int-quantized and naive-quantized."""
    groups = weight_groups(quantisation.options)
    for module in parts.ending(".weight_packed"):
        args = _settings_of(groups, module)
        bits = args.get("num_bits", 8)
        symmetric = args.get("symmetric", True) is not False
        yield find_packed(parts, module, bits, group_size(args, None), symmetric)
    for module in parts.ending(".weight"):
        if parts.stored[f"{module}.weight"].dtype in _ONE_BYTE:
            args = _settings_of(groups, module)
            block = block_size(args, "block_structure")
            group = group_size(args, None)
            if args.get("strategy") == "group" and group is not None:
                block = (1, group)
            zero = None
            if args.get("symmetric", True) is False:
                zero = f"{module}.weight_zero_point"
            yield _scaled(parts, module, f"{module}.weight_scale", block, zero)
    parts.drop(*_OF_ACTIVATIONS, ".weight_zero_point")


def find_bitsandbytes(parts: Parts, quantisation: Quantisation) -> Iterator[tuple[str, Form]]:
    """Two elements a byte with their table (nf4, fp4), or int8 with the largest value of a row."""
    for kind in ("nf4", "fp4"):
        for weight in parts.ending(f".quant_state.bitsandbytes__{kind}"):
            yield weight, _lookup(parts, weight, f"{weight}.quant_state.bitsandbytes__{kind}")
    for module in parts.ending(".SCB"):
        order = f"{module}.weight_format"
        if parts.take_if_there(order, ("U8",)) is not None and parts.text(order) != _BY_ROW:
            raise parts.wrong(order, "names an order of elements that cannot be read")
        rows = parts.matrix(f"{module}.weight", ("I8",))[0]
        parts.take(f"{module}.SCB", FLOATS, (rows,))
        name, form = _scaled(parts, module, f"{module}.SCB", None, factor=7.874015718698502e-3)
        yield name, form


def find_mxfp4(parts: Parts, quantisation: Quantisation) -> Iterator[tuple[str, Form]]:
    """The experts of gpt-oss."""
    for name in parts.ending("_blocks"):
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        shape = parts.take(blocks, ("U8",)).shape
        if len(shape) != 4 or shape[3] != 16 or not math.prod(shape):
            raise parts.wrong(blocks, f"has shape {list(shape)} instead of [experts, out, .., 16]")
        parts.take(scales, ("U8",), shape[:3])
        yield name, Mxfp4Form((shape[0], 32 * shape[2], shape[1]), blocks, scales)


def _scaled(
    parts: Parts,
    module: str,
    scale: str,
    block: tuple[int, int] | None,
    zero_point: str | None = None,
    factor: float = 1.0,
) -> tuple[str, Form]:
    weight = f"{module}.weight"
    rows, columns = parts.matrix(weight, _ONE_BYTE)
    stored = parts.take(scale, _SCALES)
    count = math.prod(stored.shape)
    if count == 1:
        block = (rows, columns)
    elif stored.shape in ((rows,), (rows, 1)):
        block = (1, columns)
    wanted = block and (blocks_of(rows, block[0]), blocks_of(columns, block[1]))
    if block is None or (count != 1 and wanted not in (stored.shape, (*stored.shape, 1))):
        raise parts.wrong(
            scale, f"has shape {list(stored.shape)} beside {rows} rows and {columns} columns"
        )
    if zero_point is not None:
        parts.take(zero_point, ("I8",), stored.shape)
    return weight, ScaledForm((rows, columns), weight, scale, block, zero_point, factor)


def _lookup(parts: Parts, weight: str, state_name: str) -> LookupForm:
    parts.take(state_name, ("U8",))
    state = _state(parts, state_name)
    shape = tuple(state["shape"])
    count, block = math.prod(shape), state["blocksize"]
    packed = parts.take(weight, ("U8", "I8", *FLOATS))
    if packed.n_bytes != blocks_of(count, 2):
        raise parts.wrong(weight, f"takes {packed.n_bytes} bytes for shape {list(shape)}")
    parts.take(f"{weight}.quant_map", ("F32",), (16,))
    n_blocks = blocks_of(count, block)
    absmax = parts.take(f"{weight}.absmax", ("F32", "U8"), (n_blocks,))
    form = LookupForm(shape, weight, f"{weight}.quant_map", f"{weight}.absmax", block)
    if absmax.dtype == "F32":
        return form
    nested = (f"{weight}.nested_quant_map", f"{weight}.nested_absmax")
    nested_block, offset = state.get("nested_blocksize", 0), state.get("nested_offset")
    if not _is_size(nested_block) or not isinstance(offset, float | int):
        raise parts.wrong(state_name, "says nothing of how its scales are quantised")
    parts.take(nested[0], ("F32",), (256,))
    parts.take(nested[1], ("F32",), (blocks_of(n_blocks, nested_block),))
    return LookupForm(
        shape, weight, form.table, form.absmax, block, nested, nested_block, float(offset)
    )


def _state(parts: Parts, name: str) -> dict[str, Any]:
    try:
        state = json.loads(parts.text(name))
    except ValueError:
        state = None
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("shape"), list)
        or len(state["shape"]) not in (1, 2)
        or not all(map(_is_size, state["shape"]))
        or not _is_size(state.get("blocksize"))
    ):
        raise parts.wrong(name, "does not parse")
    return state


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < _MAX_SIZE


def _settings_of(groups: list[tuple[list[str], dict[str, Any]]], module: str) -> dict[str, Any]:
    """The settings of a module's weights: targets that name it come before those of a class."""
    named = (args for targets, args in groups if any(_names(target, module) for target in targets))
    of_class = (args for targets, args in groups if "Linear" in targets)
    return next(named, None) or next(of_class, groups[0][1])


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return module == target or module.endswith(f".{target}")
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise CheckpointError(
            f"config.json: a target of quantization_config is no pattern ({target!r:.60})"
        ) from error
