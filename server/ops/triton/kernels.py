"""`server.ops.kernels.Kernels` for a GPU, checked against torch before use (`selfcheck`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from server.ops.attention import AttentionCall, DecodeBatch, HeadNorm
from server.ops.blockdiag import BlockDiagOp
from server.ops.factors import ImpartFactors, LowRankFactors
from server.ops.kernels import KernelState, TorchKernels
from server.ops.linear import LinearOp
from server.ops.lowrank import HeldLowRank
from server.ops.norm import RmsForm
from server.ops.packed import PackedBlocks
from server.ops.quantize import QuantizedWeight, TorchQuantizedLinear
from server.ops.row_mapping import RowMapping, SlotSegments
from server.ops.triton.attention import NewTokens, paged_decode
from server.ops.triton.blockdiag import (
    PREFILL_ROWS,
    block_kernel,
    blockdiag_add_,
)
from server.ops.triton.impart import impart_add_
from server.ops.triton.linear import linear_
from server.ops.triton.lowrank import lowrank_add_
from server.ops.triton.norm import add_rms_norm, rms_norm, silu_mul
from server.ops.triton.packed_lowrank import packed_lowrank_add_
from server.ops.triton.prefill import PrefillTiles, paged_prefill_, prefill_tiles, tokens_of
from server.ops.triton.rope import rope_and_write_
from server.ops.triton.segments import DECODE_ROWS, SegmentArrays, from_table


class TritonBlockDiag:
    """`server.ops.blockdiag.BlockDiagOp` for one set of slot arrays."""

    def __init__(self, blocks: PackedBlocks) -> None:
        self._blocks = blocks
        self._decode = block_kernel(blocks)
        self._prefill = block_kernel(blocks, prefill=True)
        n = len(blocks.codes)
        self._same = torch.arange(1, n + 1, dtype=torch.int32, device=blocks.codes.device)

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`."""
        prefill = segments.longest > DECODE_ROWS
        where = from_table(segments, PREFILL_ROWS if prefill else DECODE_ROWS)
        kernel = self._prefill if prefill else self._decode
        # The engine's table names places, a static step's slots.
        places = self._same if segments.count is None else self._blocks.place_of
        assert places is not None
        blockdiag_add_(outputs, x, where, self._blocks, kernel, places)


def segments_by_slot(rows: RowMapping) -> SegmentArrays:
    """All segments of the step, cut into tiles of rows."""
    segments = rows.by_slot()
    prefill = segments.longest > DECODE_ROWS
    return from_table(segments, PREFILL_ROWS if prefill else DECODE_ROWS)


class TritonQuantizedLinear(TorchQuantizedLinear):
    """Weight-only 8-bit base linear: half the bytes of a decode step."""

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [T, n]`` -> ``[T, m]``."""
        y = torch.empty(len(x), len(self._weight.values), dtype=x.dtype, device=x.device)
        linear_(y, x if x.stride(1) == 1 else x.contiguous(), self._weight)
        return y if bias is None else y.add_(bias)


def _decode(
    q: Tensor,
    sinks: Tensor | None,
    call: AttentionCall,
    batch: DecodeBatch,
    *,
    out: Tensor | None = None,
    new: NewTokens | None = None,
) -> Tensor:
    return paged_decode(
        q,
        call.k_cache,
        call.v_cache,
        batch.kv_blocks,
        batch.lengths,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        chunk=call.chunk,
        sinks=sinks,
        out=out,
        new=new,
    )


def _flat(sinks: Tensor | None) -> Tensor | None:
    return sinks if sinks is None or sinks.stride(-1) == 1 else sinks.contiguous()


class TritonKernels(TorchKernels):
    """Deltas, attention, RoPE with the cache write, norms and SiLU-mul in Triton; the base's
    products in cuBLAS; forms the kernels do not know in torch.
    """

    name = "triton"
    state: KernelState = "compiled"  # each when it is first called

    def __init__(self, device: torch.device) -> None:
        self._base_row = torch.zeros(1, dtype=torch.int64, device=device)

    def takes_data(self, device: torch.device) -> bool:
        return True

    def on_compiled(self, call: Callable[[], None]) -> None:
        triton.knobs.runtime.jit_post_compile_hook = lambda **_: call()

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        return TritonBlockDiag(blocks)

    def lowrank_add_(
        self,
        outputs: Sequence[Tensor],
        x: Tensor,
        rows: RowMapping,
        terms: Sequence[LowRankFactors],
    ) -> None:
        lowrank_add_(outputs, x, segments_by_slot(rows), terms)

    def packed_lowrank_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[HeldLowRank]
    ) -> None:
        factors = [term.factors for term in terms]
        packed_lowrank_add_(outputs, x, segments_by_slot(rows), factors)

    def impart_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[ImpartFactors]
    ) -> None:
        impart_add_(outputs, x, segments_by_slot(rows), terms)

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype) -> LinearOp:
        return TritonQuantizedLinear(weight, dtype)

    def rotate_and_write_(self, call: AttentionCall) -> None:
        if call.rotary is None:
            super().rotate_and_write_(call)
            return
        angles, caches = (call.rotary.cos, call.rotary.sin), (call.k_cache, call.v_cache)
        rope_and_write_(call.q, call.k, call.v, *angles, *caches, call.metadata.cache_rows)

    def decode_(self, out: Tensor, call: AttentionCall) -> None:
        batch = call.metadata.decode
        assert batch is not None
        sinks = _flat(call.sinks)
        if len(batch.rows) == len(call.q):
            _decode(call.q, sinks, call, batch, out=out)
        else:
            if sinks is not None and sinks.dim() == 2:
                sinks = sinks[batch.rows]
            out[batch.rows] = _decode(call.q[batch.rows], sinks, call, batch)

    def rotate_and_decode_(self, out: Tensor, call: AttentionCall) -> bool:
        assert call.rotary is not None
        assert call.metadata.decode is not None
        norms = None
        if call.norms is not None:
            q_norm, k_norm = (self._indexed(norm, len(call.q)) for norm in call.norms)
            form = q_norm.form
            if form != k_norm.form or form.casts_first != (form.offset == 0.0):
                return False
            norms = q_norm, k_norm
        angles = call.rotary.cos, call.rotary.sin
        new = NewTokens(call.k, call.v, *angles, call.metadata.cache_rows, norms)
        _decode(call.q, _flat(call.sinks), call, call.metadata.decode, out=out, new=new)
        return True

    def _indexed(self, norm: HeadNorm, n_rows: int) -> HeadNorm:
        return (
            norm if norm.index is not None else replace(norm, index=self._base_row.expand(n_rows))
        )

    def prefill_(self, out: Tensor, call: AttentionCall) -> None:
        metadata, dtype = call.metadata, call.q.dtype
        if "tile_table" not in metadata.made:
            made = prefill_tiles(metadata.prefill, call.q.device, dtype)
            metadata.made["tile_table"], metadata.made["tile_kv_blocks"] = (
                made.table,
                made.kv_blocks,
            )
        tables = metadata.made["tile_table"], metadata.made["tile_kv_blocks"]
        tiles = PrefillTiles(*tables, tokens_of(dtype))
        paged_prefill_(
            out,
            call.q,
            call.k_cache,
            call.v_cache,
            tiles,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            chunk=call.chunk,
            sinks=_flat(call.sinks),
        )

    def rms_norm(self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
        if form.casts_first != (form.offset == 0.0):
            return super().rms_norm(x, weights, index, form)
        which = self._base_row if index is None else index
        rows = x.reshape(len(which), -1, x.shape[-1])
        return rms_norm(rows, weights, which, form.eps, offset=form.offset).view(x.shape)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> tuple[Tensor, Tensor]:
        if form.casts_first != (form.offset == 0.0):
            return super().add_rms_norm(x, residual, weights, index, form)
        which = self._base_row if index is None else index
        rows, other = (t.reshape(len(which), -1, t.shape[-1]) for t in (x, residual))
        both = add_rms_norm(rows, other, weights, which, form.eps, offset=form.offset)
        return both[0].view(x.shape), both[1].view(x.shape)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return silu_mul(gate, up)
