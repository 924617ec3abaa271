"""The engine's interface over the kernels: same results as the torch reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from server.ops.attention import (
    AttentionCall,
    AttentionMetadata,
    DecodeBatch,
    HeadNorm,
    Rotary,
)
from server.ops.blockdiag import TorchBlockDiag
from server.ops.kernels import Kernels, TorchKernels
from server.ops.norm import RmsForm
from server.ops.row_mapping import RowMapping, SlotSegments
from server.ops.selfcheck import check_kernels
from server.ops.triton.kernels import TritonKernels
from tests.server.ops.triton.helpers import CPU, generator, pack, random_term, segments_of


@pytest.mark.parametrize("counts", [[(-1, 2), (0, 1), (2, 3)], [(0, 2), (2, 21)]])
def test_blockdiag_op_equals_the_torch_op(counts: list[tuple[int, int]]) -> None:
    kernels: Kernels = TritonKernels(CPU)
    sizes = (24, 16)
    variants = {s: [random_term((m, 30), 2, 4, s + m) for m in sizes] for s in (0, 2)}
    blocks, _ = pack(variants, 3)
    table = RowMapping(segments_of(counts), CPU).table(frozenset({(0, 0), (2, 2)}))
    rows = sum(n for _, n in counts)
    x = torch.randn(rows, 30, generator=generator(0))
    want, got = torch.zeros(rows, 40), torch.zeros(rows, 40)
    TorchBlockDiag(blocks).add_(want.split(sizes, 1), x, table)
    kernels.blockdiag(blocks).add_(got.split(sizes, 1), x, table)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_blockdiag_op_finds_places_by_slot_where_rows_are_data() -> None:
    terms = {place: [random_term((24, 30), 2, 4, place)] for place in (0, 1)}
    blocks, _ = pack(terms, 2)
    place_of = torch.tensor([0, 2, 0, 1], dtype=torch.int32)  # slot 1: place 1, slot 3: place 0
    blocks = replace(blocks, place_of=place_of)
    table = torch.tensor([[3, 0, 2], [1, 2, 3], [2, 3, 4], [9, 4, 5], [1, 0, 5]])
    segments = SlotSegments(table, 5, 16, torch.tensor([4], dtype=torch.int32))
    x = torch.randn(5, 30, generator=generator(0))
    want, got = torch.zeros(5, 24), torch.zeros(5, 24)
    want[:2] = x[:2] @ terms[0][0].to_dense().T
    want[2:3] = x[2:3] @ terms[1][0].to_dense().T
    TritonKernels(CPU).blockdiag(blocks).add_([got], x, segments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.zero_()
    TorchBlockDiag(blocks).add_([got], x, segments)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [RmsForm(1e-5, 0.0, True), RmsForm(1e-5, 0.0, False)])
@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, 2])])
def test_add_rms_norm_of_any_form_equals_the_torch_op(form: RmsForm, index: Tensor | None) -> None:
    x, residual = torch.randn(2, 1, 3, 24, generator=generator(0))
    weights = torch.randn(3, 24, generator=generator(1))
    got = TritonKernels(CPU).add_rms_norm(x, residual, weights, index, form)
    want = TorchKernels().add_rms_norm(x, residual, weights, index, form)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rotate_and_decode_norms_of_two_forms_are_left_to_others() -> None:
    x, cache = torch.randn(1, 2, 16), torch.zeros(1, 4, 2, 16)
    decode = DecodeBatch(torch.arange(1), torch.zeros(1, 1).int(), torch.ones(1).int())
    metadata = AttentionMetadata(torch.zeros(1).long(), decode, ())
    norms = [HeadNorm(torch.ones(1, 16), None, RmsForm(eps, 0.0, True)) for eps in (1e-5, 1e-3)]
    rotary = Rotary(torch.ones(1, 16), torch.zeros(1, 16))
    for chosen, done in (((norms[0], norms[1]), False), ((norms[1], norms[1]), True)):
        call = AttentionCall(
            x, x, x, cache, cache.clone(), metadata, 1.0, rotary=rotary, norms=chosen
        )
        assert TritonKernels(CPU).rotate_and_decode_(torch.zeros(1, 2, 16), call) == done
        assert bool(cache.any()) == done


def test_on_compiled_is_told_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[None] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", None)
    TritonKernels(CPU).on_compiled(lambda: told.append(None))
    hook = triton.knobs.runtime.jit_post_compile_hook
    assert hook is not None
    hook(key="k", repr="r", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
    assert told == [None]


def test_self_check_passes_for_these_kernels() -> None:
    check_kernels(TritonKernels(CPU), CPU, torch.float32)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("silu_mul", "silu_mul"),
        ("rms_norm", "rms_norm"),
        ("add_rms_norm", "add_rms_norm"),
        ("rotate_and_write_", "rotate_and_write"),
        ("decode_", "decode attention"),
        ("rotate_and_decode_", "rotate_and_decode"),
        ("prefill_", "prefill attention"),
        ("lowrank_add_", "lowrank"),
        ("packed_lowrank_add_", "packed lowrank 3 bit"),
        ("impart_add_", "impart"),
        ("blockdiag", "blockdiag 3 bit"),
    ],
)
def test_self_check_names_a_wrong_kernel_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, method: str, named: str
) -> None:
    class Wrong(TorchKernels):
        """Right but for one method."""

    class Nothing:
        def add_(self, *args: object) -> None:
            pass

    def wrong(self: Wrong, *args: Any) -> Any:
        if method == "blockdiag":
            return Nothing()
        if method == "rotate_and_decode_":
            args[0].zero_()
            return True
        result = getattr(TorchKernels, method)(self, *args)
        if method in ("decode_", "prefill_") or method.endswith("_add_"):
            args[0][0][0] += 1
        if method == "rotate_and_write_":
            args[0].k_cache[0] += 1
        if method == "add_rms_norm":
            return result[0], result[1] + 1
        return None if result is None else result * 1.5

    monkeypatch.setattr(Wrong, method, wrong, raising=False)
    with pytest.raises(ValueError, match="--kernels torch") as caught:
        check_kernels(Wrong(), CPU, torch.float32)
    assert named in str(caught.value)


def test_self_check_reports_a_kernel_that_does_not_run() -> None:
    class Broken(TorchKernels):
        def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
            raise RuntimeError("no kernel image is available")

    with pytest.raises(ValueError, match=r"silu_mul .*no kernel image"):
        check_kernels(Broken(), CPU, torch.float32)
