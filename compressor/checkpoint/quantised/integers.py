"""Find matrices of packed integers: GPTQ's, AWQ's and compressed-tensors' forms."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from compressor.checkpoint.quantised.forms import AwqForm, Form, GptqForm, PackedForm
from compressor.checkpoint.quantised.parts import FLOATS, Parts, blocks_of
from compressor.checkpoint.quantised.settings import Quantisation, group_size

_WORD = 32
_INTEGERS = ("I32", "I64")


def find_gptq(parts: Parts, quantisation: Quantisation) -> Iterator[tuple[str, Form]]:
    """Every module with a ``qweight``, of 2, 3, 4 or 8 bits."""
    options = quantisation.options
    bits: int = options["bits"]
    version = options.get("checkpoint_format", options.get("format", "gptq"))
    for module in parts.ending(".qweight"):
        qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        n_words, n_out = parts.matrix(qweight, ("I32",))
        n_groups, width = parts.matrix(scales, FLOATS)
        n_in = n_words * _WORD // bits
        if width != n_out or n_words * _WORD % bits:
            raise parts.wrong(scales, f"has shape [{n_groups}, {width}] beside {n_out} outputs")
        parts.take(qzeros, ("I32",), (n_groups, blocks_of(n_out * bits, _WORD)))
        g_idx: str | None = f"{module}.g_idx"
        if parts.take_if_there(f"{module}.g_idx", _INTEGERS, (n_in,)) is None:
            if options.get("desc_act"):
                raise parts.wrong(qweight, f"is in the order of activations without {g_idx}")
            g_idx = None
        group = _group(parts, scales, n_in, n_groups, group_size(options, 128))
        added = 1 if version == "gptq" else 0
        yield (
            f"{module}.weight",
            GptqForm((n_out, n_in), bits, qweight, qzeros, scales, g_idx, group, added),
        )


def find_awq(parts: Parts, quantisation: Quantisation) -> Iterator[tuple[str, Form]]:
    """Every module with a ``qweight``, in the order that AutoAWQ's GEMM kernel reads."""
    for module in parts.ending(".qweight"):
        qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        n_in, n_words = parts.matrix(qweight, ("I32",))
        n_out = n_words * 8
        n_groups = parts.matrix(scales, FLOATS)[0]
        parts.take(scales, FLOATS, (n_groups, n_out))
        parts.take(qzeros, ("I32",), (n_groups, n_words))
        group = _group(parts, scales, n_in, n_groups, group_size(quantisation.options, 128))
        yield f"{module}.weight", AwqForm((n_out, n_in), qweight, qzeros, scales, group)


def find_packed(
    parts: Parts, module: str, bits: int, group: int | None, symmetric: bool
) -> tuple[str, Form]:
    """One matrix of compressed-tensors' format pack-quantized."""
    packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
    n_out, n_words = parts.matrix(packed, ("I32",))
    n_in = _stated_width(parts, f"{module}.weight_shape", n_out)
    if n_words != blocks_of(n_in * bits, _WORD):
        raise parts.wrong(packed, f"has {n_words} words a row for {n_in} inputs of {bits} bits")
    shape = parts.take(scale, FLOATS).shape
    n_groups = shape[1] if len(shape) == 2 else 1
    if shape not in ((1,), (), (n_out, n_groups)) or not n_groups:
        raise parts.wrong(scale, f"has shape {list(shape)} beside {n_out} outputs")
    zero_point: str | None = None
    if not symmetric:
        zero_point = f"{module}.weight_zero_point"
        words = (blocks_of(n_out * bits, _WORD), n_groups)
        is_packed = parts.take(zero_point, ("I32", "I8")).dtype == "I32"
        parts.take(zero_point, ("I32", "I8"), words if is_packed else (n_out, n_groups))
    else:
        parts.drop(f"{module}.weight_zero_point")
    g_idx: str | None = f"{module}.weight_g_idx"
    if parts.take_if_there(f"{module}.weight_g_idx", _INTEGERS, (n_in,)) is None:
        g_idx = None
    size = _group(parts, scale, n_in, n_groups, group)
    form = PackedForm((n_out, n_in), bits, packed, scale, zero_point, g_idx, size)
    return f"{module}.weight", form


def _group(parts: Parts, scales: str, n_in: int, n_groups: int, stated: int | None) -> int:
    """Inputs a group. Raises CheckpointError unless the scales are as many as there are groups."""
    group = n_in if n_groups == 1 else stated or n_in
    if blocks_of(n_in, group) != n_groups:
        raise parts.wrong(
            scales, f"has {n_groups} groups for {n_in} inputs in groups of {stated or n_in}"
        )
    return group


def _stated_width(parts: Parts, name: str, n_out: int) -> int:
    tensor = parts.take(name, _INTEGERS, (2,))
    rows, columns = struct.unpack("<2q" if tensor.dtype == "I64" else "<2i", parts.text(name))
    if rows != n_out or not 0 < columns < 1 << 31:
        raise parts.wrong(name, f"says [{rows}, {columns}] beside {n_out} outputs")
    return int(columns)
