"""Compiled CPU kernels against their torch references, and those against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from server.model.norm import find_form
from server.ops.attention import (
    AttentionCall,
    AttentionMetadata,
    DecodeBatch,
    Rotary,
    paged_attention,
)
from server.ops.cpu import kernels as kernels_module
from server.ops.cpu.kernels import NumbaKernels, numba_kernels
from server.ops.kernels import Kernels, TorchKernels
from server.ops.norm import RmsForm, rms_norm

BLOCK_TOKENS = 4
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> NumbaKernels:
    return NumbaKernels()


def close(ours: Tensor, wanted: Tensor) -> None:
    loose = ours.dtype is torch.bfloat16
    torch.testing.assert_close(
        ours, wanted, rtol=2**-7 if loose else 1e-5, atol=2**-7 if loose else 1e-6
    )


def metadata_for(lengths: list[int], n_prefill: int) -> AttentionMetadata:
    """Decode rows first, then a chunk; every sequence on shuffled KV blocks of its own."""
    n_kv_blocks = [-(-n // BLOCK_TOKENS) for n in lengths]
    order = torch.randperm(sum(n_kv_blocks) + 2, generator=torch.Generator().manual_seed(0))
    tables = list(torch.split(order[: sum(n_kv_blocks)], n_kv_blocks))
    widest = max(n_kv_blocks, default=0)
    kv_blocks = torch.stack([F.pad(t, (0, widest - len(t))) for t in tables])
    cache_rows = [
        int(t[(n - 1) // BLOCK_TOKENS]) * BLOCK_TOKENS + (n - 1) % BLOCK_TOKENS
        for t, n in zip(tables, lengths, strict=True)
    ]
    cache_rows += [int(order[-1]) * BLOCK_TOKENS + i for i in range(n_prefill)]
    rows = torch.arange(len(lengths))
    return AttentionMetadata(
        cache_rows=torch.tensor(cache_rows),
        decode=DecodeBatch(rows, kv_blocks, torch.tensor(lengths)),
        prefill=(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 32), (4, 4, 16), (3, 1, 20)])
@pytest.mark.parametrize("lengths", [[1, 9, 4], [5, 12, 1, 3, 8, 2, 7, 16]])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0)])
def test_decode_and_cache_equal_the_torch_reference(
    kernels: NumbaKernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    lengths: list[int],
    window: int | None,
    softcap: float | None,
) -> None:
    metadata = metadata_for(lengths, n_prefill=3)
    n_rows, n_kv_blocks = len(lengths) + 3, int(metadata.decode.kv_blocks.max()) + 3  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    k_cache = torch.randn(n_kv_blocks + 9, BLOCK_TOKENS, kv_heads, dim, generator=generator).to(
        dtype
    )
    v_cache = torch.randn(k_cache.shape, generator=generator).to(dtype)
    q = torch.randn(heads, n_rows, dim, generator=generator).to(dtype).transpose(0, 1)
    k = torch.randn(kv_heads, n_rows, dim, generator=generator).to(dtype).transpose(0, 1)
    v = torch.randn(n_rows, kv_heads, dim, generator=generator).to(dtype)
    results = []
    for chosen in (TorchKernels(), kernels):
        caches = k_cache.clone(), v_cache.clone()
        call = AttentionCall(q, k, v, *caches, metadata, 0.3, window, softcap)
        out = paged_attention(call, chosen)[: len(lengths)]
        results.append((out, *caches))
    (wanted, *written), (ours, *also) = results
    close(ours, wanted)
    assert torch.equal(written[0], also[0])
    assert torch.equal(written[1], also[1])


def test_decode_one_sequence_of_nan_spoils_no_other(kernels: NumbaKernels) -> None:
    metadata = metadata_for([6, 6, 6, 6, 6], n_prefill=0)
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    q[2], k[2] = float("nan"), float("nan")
    caches = [torch.randn(12, BLOCK_TOKENS, 2, 16) for _ in range(2)]
    out = paged_attention(AttentionCall(q, k, v, *caches, metadata, 0.25), kernels)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Element by element in float64: dimension i with i + R / 2."""
    out, half = x.double().clone(), cos.shape[1] // 2
    for t in range(len(x)):
        for i in range(half):
            a, b = x[t, :, i].double(), x[t, :, half + i].double()
            c, s = cos[t].double(), sin[t].double()
            out[t, :, i] = a * c[i] - b * s[i]
            out[t, :, half + i] = b * c[half + i] + a * s[half + i]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [16, 6])
@pytest.mark.parametrize("name", ["torch", "numba"])
def test_rotate_and_write_slices_of_one_tensor_equal_the_element_loop(
    kernels: NumbaKernels, dtype: torch.dtype, rotated: int, name: str
) -> None:
    chosen = kernels if name == "numba" else TorchKernels()
    generator = torch.Generator().manual_seed(2)
    n, heads, kv_heads, dim = 11, 4, 2, 16
    fused = torch.randn(n, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    before = fused.clone()
    q, k, v = (
        t.view(n, -1, dim) for t in fused.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    angles = torch.randn(n, rotated, generator=generator)
    rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype))
    cache_rows = torch.randperm(5 * BLOCK_TOKENS, generator=generator)[:n]
    metadata = AttentionMetadata(cache_rows=cache_rows, decode=None, prefill=())
    caches = [torch.zeros(5, BLOCK_TOKENS, kv_heads, dim, dtype=dtype) for _ in range(2)]
    old_q, old_k, old_v = (t.clone() for t in (q, k, v))
    chosen.rotate_and_write_(AttentionCall(q, k, v, *caches, metadata, 1.0, rotary=rotary))
    close(q, turned(old_q, rotary.cos, rotary.sin).to(dtype))
    close(k, turned(old_k, rotary.cos, rotary.sin).to(dtype))
    assert torch.equal(v, old_v)
    assert torch.equal(caches[0].flatten(0, 1)[cache_rows], k)
    assert torch.equal(caches[1].flatten(0, 1)[cache_rows], v)
    assert not torch.equal(fused, before)


def test_rotate_and_write_strided_last_axis_is_refused(kernels: NumbaKernels) -> None:
    q = torch.randn(3, 16, 2).transpose(1, 2)
    metadata = AttentionMetadata(cache_rows=torch.arange(3), decode=None, prefill=())
    caches = [torch.zeros(1, BLOCK_TOKENS, 2, 16) for _ in range(2)]
    with pytest.raises(ValueError, match="contiguous"):
        kernels.rotate_and_write_(AttentionCall(q, q, q, *caches, metadata, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [RmsForm(1e-5, 0.0, True), RmsForm(1e-6, 1.0, False)])
@pytest.mark.parametrize("shape", [(5, 40), (1, 17, 3, 16)])
def test_rms_norm_weight_per_row_equals_the_torch_reference(
    kernels: NumbaKernels, dtype: torch.dtype, form: RmsForm, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weights = torch.randn(4, shape[-1], generator=generator).to(dtype)
    n = shape[0] if len(shape) == 2 else shape[1]
    index = torch.randint(0, 4, (n,), generator=generator)
    for chosen in (index, None):
        ours = kernels.rms_norm(x, weights, chosen, form)
        close(ours, rms_norm(x, weights, chosen, form))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [RmsForm(1e-5, 0.0, True), RmsForm(1e-6, 1.0, False)])
@pytest.mark.parametrize("strided", [False, True])
def test_add_rms_norm_any_backend_gives_the_bits_of_both_operations(
    kernels: NumbaKernels, dtype: torch.dtype, form: RmsForm, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 1, 19, 90 if strided else 45, generator=generator).to(dtype)
    x, residual = wide[..., :45]
    weights = torch.randn(4, 45, generator=generator).to(dtype)
    index = torch.randint(0, 4, (19,), generator=generator)
    backends: tuple[Kernels, ...] = (kernels, TorchKernels())
    for backend in backends:
        for chosen in (index, None):
            normed, summed = backend.add_rms_norm(x, residual, weights, chosen, form)
            assert torch.equal(summed, residual + x)
            assert torch.equal(normed, backend.rms_norm(residual + x, weights, chosen, form))
            assert normed.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_any_backend_equals_float64(kernels: NumbaKernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual = torch.randn(2, 7, 64, generator=generator).to(dtype) * 30
    weight = torch.randn(1, 64, generator=generator).to(dtype)
    form = RmsForm(1e-5, 0.0, True)
    exact = (residual.double() + x.double()).to(dtype).double()
    want = exact / (exact.square().mean(-1, keepdim=True) + form.eps).sqrt() * weight.double()
    backends: tuple[Kernels, ...] = (kernels, TorchKernels())
    for backend in backends:
        normed, _ = backend.add_rms_norm(x, residual, weight, None, form)
        bound = 2**-7 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(normed.double(), want, rtol=bound, atol=bound)


def test_add_rms_norm_sum_past_the_largest_value_stays_as_in_torch(kernels: NumbaKernels) -> None:
    x = torch.tensor([[3e38, 1.0, float("nan"), -0.0]]).to(torch.bfloat16)
    residual = torch.tensor([[3e38, 2.0**-9, 1.0, -0.0]]).to(torch.bfloat16)
    weight = torch.ones(1, 4, dtype=torch.bfloat16)
    _, summed = kernels.add_rms_norm(x, residual, weight, None, RmsForm(1e-5, 0.0, True))
    torch.testing.assert_close(summed, residual + x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [LlamaRMSNorm(24, eps=1e-5), GemmaRMSNorm(24, eps=1e-6)])
def test_find_form_known_norm_reproduces_it_exactly(
    module: torch.nn.Module, dtype: torch.dtype
) -> None:
    module = module.to(dtype)
    with torch.no_grad():
        module.weight.normal_()  # type: ignore[union-attr, operator]
    form = find_form(module)
    assert form is not None
    x = torch.randn(7, 24).to(dtype)
    ours = rms_norm(x, module.weight.data.unsqueeze(0), None, form)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(ours, module(x), rtol=1e-6, atol=1e-6)


def test_find_form_layer_norm_is_none() -> None:
    assert find_form(torch.nn.LayerNorm(16)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_strided_halves_equal_torch(kernels: NumbaKernels, dtype: torch.dtype) -> None:
    fused = (torch.randn(13, 70, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    gate, up = torch.split(fused, 35, dim=1)
    close(kernels.silu_mul(gate, up), F.silu(gate) * up)


def test_silu_mul_infinite_and_nan_gates_stay_as_in_torch(kernels: NumbaKernels) -> None:
    gate = torch.tensor([[float("nan"), float("inf"), -1e30, 1e30, -100.0, 0.0]])
    up = torch.ones_like(gate)
    torch.testing.assert_close(
        kernels.silu_mul(gate, up), F.silu(gate), equal_nan=True, rtol=1e-5, atol=1e-6
    )


def test_numba_kernels_are_compiled_when_the_setting_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def asked() -> frozenset[str]:
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(kernels_module, "untried_kernels", lambda: ("rows",))
    monkeypatch.setattr(kernels_module, "passed_kernels", frozenset)
    monkeypatch.setattr(kernels_module, "usable_kernels", asked)
    assert numba_kernels("background").state == "compiling"
    assert not caplog.messages
    assert numba_kernels("never").state == "uncompiled"
    assert "`impart-serve compile` compiles them" in caplog.text
    with pytest.raises(AssertionError, match="nothing is"):
        numba_kernels("wait")
    monkeypatch.setattr(kernels_module, "usable_kernels", frozenset)
    monkeypatch.setattr(kernels_module, "untried_kernels", tuple)
    assert numba_kernels("background").state == "uncompiled"  # none is of use here
