"""The values of matrices that are stored quantised, in the dtype of their model.

Everything is computed in float32 from the stored integers and scales, and rounded once to the dtype
asked for, as the formats' own libraries do; float8 and 4-bit values and their products with a scale
of 16 bits are exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import singledispatch

import torch
from torch import Tensor

from compressor.checkpoint.quantised.forms import (
    AwqForm,
    Form,
    GptqForm,
    LookupForm,
    Mxfp4Form,
    PackedForm,
    ScaledForm,
)
from compressor.errors import CheckpointError

Read = Callable[[str, int, int | None], Tensor]  # a stored tensor's rows
_CHUNK_ELEMENTS = 4 << 20
_WORD = 32
# Where AWQ puts the eight outputs of a word: output k is at place _AWQ_PLACES[k].
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantise(
    form: Form, read: Read, dtype: torch.dtype, name: str, member: int | None = None
) -> Tensor:
    """Return the dense tensor of `form`, or one matrix of a 3-D one.

    read  gives rows of a stored tensor by its name, as they are stored

    Raises CheckpointError for values that are not finite and for groups that do not exist; `name`
    says in it where.
    """
    if isinstance(form, Mxfp4Form):
        dense = _mxfp4(form, read, dtype, member)
        _check_finite(dense, name)
        return dense
    parts = {part: read(part, 0, None) for part in _part_names(form)}
    n_out, width = form.shape[0], math.prod(form.shape[1:])
    dense = torch.empty(n_out, width, dtype=dtype)
    step = max(8, _CHUNK_ELEMENTS // max(1, width) // 8 * 8)
    for start in range(0, n_out, step):
        end = min(start + step, n_out)
        dense[start:end] = dense_rows(form, parts, start, end)
        _check_finite(dense[start:end], name)
    return dense.reshape(form.shape)


def _check_finite(values: Tensor, name: str) -> None:
    if not values.isfinite().all():
        raise CheckpointError(
            f"{name}: its quantised weights give values that are not finite in {values.dtype}"
        )


def _part_names(form: Form) -> Iterator[str]:
    for field in fields(form):
        value = getattr(form, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str):
                yield part


@singledispatch
def dense_rows(form: Form, parts: dict[str, Tensor], start: int, end: int) -> Tensor:
    """Return rows ``[start, end)`` in float32; `parts` are the form's stored tensors by name.

    `start` is a multiple of 8.
    """
    raise AssertionError(form)


@dense_rows.register
def _(form: GptqForm, parts: dict[str, Tensor], start: int, end: int) -> Tensor:
    n_out, n_in = form.shape
    codes = unpack(parts[form.qweight][:, start:end].T, form.bits, n_in)
    zeros = unpack(parts[form.qzeros], form.bits, n_out)[:, start:end].T
    zeros = (zeros + form.added) & ((1 << form.bits) - 1)
    scales = parts[form.scales][:, start:end].T.float()
    group = _groups(parts, form.g_idx, n_in, form.group, scales.shape[1])
    return (codes - zeros[:, group]).float() * scales[:, group]


@dense_rows.register
def _(form: AwqForm, parts: dict[str, Tensor], start: int, end: int) -> Tensor:
    words = slice(start // 8, -(-end // 8))
    codes = _awq_columns(parts[form.qweight][:, words]).T[: end - start]
    zeros = _awq_columns(parts[form.qzeros][:, words]).T[: end - start]
    scales = parts[form.scales][:, start:end].T.float()
    group = torch.arange(form.shape[1]) // form.group
    return (codes - zeros[:, group]).float() * scales[:, group]


@dense_rows.register
def _(form: PackedForm, parts: dict[str, Tensor], start: int, end: int) -> Tensor:
    n_out, n_in = form.shape
    half = 1 << (form.bits - 1)
    codes = unpack(parts[form.packed][start:end], form.bits, n_in) - half
    scales = parts[form.scale].float().reshape(-1, parts[form.scale].shape[-1:].numel())
    scales = scales.expand(n_out, -1)[start:end]
    group = _groups(parts, form.g_idx, n_in, form.group, scales.shape[1])
    if form.zero_point is not None:
        zeros = parts[form.zero_point]
        if zeros.dtype != torch.int8:
            zeros = unpack(zeros.T, form.bits, n_out).T - half
        codes = codes - zeros[start:end].to(torch.int32)[:, group]
    return codes.float() * scales[:, group]


@dense_rows.register
def _(form: ScaledForm, parts: dict[str, Tensor], start: int, end: int) -> Tensor:
    n_out, n_in = form.shape
    grid = (-(-n_out // form.block[0]), -(-n_in // form.block[1]))
    row = torch.arange(start, end) // form.block[0]
    column = torch.arange(n_in) // form.block[1]
    values = parts[form.weight][start:end].float()
    if form.zero_point is not None:
        values -= parts[form.zero_point].float().reshape(grid)[row][:, column]
    values *= _powers_or_floats(parts[form.scale]).reshape(grid)[row][:, column]
    return values if form.factor == 1.0 else values * form.factor


@dense_rows.register
def _(form: LookupForm, parts: dict[str, Tensor], start: int, end: int) -> Tensor:
    width = math.prod(form.shape[1:])
    first, last = start * width, end * width
    data = parts[form.packed].contiguous().view(torch.uint8).reshape(-1)[first // 2 : -(-last // 2)]
    codes = torch.stack((data >> 4, data & 15), dim=1).reshape(-1)[first % 2 :][: last - first]
    blocks = torch.arange(first // form.block, (last - 1) // form.block + 1)
    scales = parts[form.absmax][blocks]
    if form.nested is not None:
        table, absmax = (parts[name] for name in form.nested)
        scales = table[scales.int()] * absmax[blocks // form.nested_block] + form.nested_offset
    which = torch.arange(first, last) // form.block - first // form.block
    return (parts[form.table][codes.int()] * scales[which]).reshape(end - start, width)


def _mxfp4(form: Mxfp4Form, read: Read, dtype: torch.dtype, member: int | None) -> Tensor:
    """``[experts, in, out]``, or one expert's matrix."""
    first, last = (0, form.shape[0]) if member is None else (member, member + 1)
    _, n_in, n_out = form.shape
    table = torch.tensor((*_E2M1, *(-value for value in _E2M1)))
    dense = torch.empty(last - first, n_in, n_out, dtype=dtype)
    for expert in range(first, last):
        blocks = read(form.blocks, expert, expert + 1)[0]
        exponents = read(form.scales, expert, expert + 1)[0].int() - 127
        codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
        values = torch.ldexp(table[codes.int()], exponents.unsqueeze(-1))
        dense[expert - first] = values.reshape(n_out, n_in).T
    return dense if member is None else dense[0]


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return int32 ``[rows, count]`` of int32 ``[rows, words]`` that are streams of bits.

    Element i of a row is its bits ``[i * bits, (i + 1) * bits)``, the lowest bit of a word first.
    """
    mask = (1 << bits) - 1
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
        return ((words.unsqueeze(-1) >> shifts) & mask).flatten(1)[:, :count]
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    place = torch.arange(count) * bits
    word, offset = place // _WORD, place % _WORD
    both = wide[:, word] | (wide[:, word + 1] << _WORD)
    return ((both >> offset) & mask).int()


def _awq_columns(words: Tensor) -> Tensor:
    """Return int32 ``[rows, 8 * words]`` in the outputs' own order."""
    places = torch.tensor(_AWQ_PLACES)
    codes = unpack(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
    return codes[:, :, places].flatten(1)


def _groups(
    parts: dict[str, Tensor], g_idx: str | None, n_in: int, group: int, n_groups: int
) -> Tensor:
    if g_idx is None:
        return torch.arange(n_in) // group
    found = parts[g_idx].long()
    if found.min() < 0 or found.max() >= n_groups:
        raise CheckpointError(f"tensor {g_idx} names a group beyond the {n_groups} with scales")
    return found


def _powers_or_floats(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents plus 127."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones(()), scale.to(torch.int32) - 127)
    return scale.float()
