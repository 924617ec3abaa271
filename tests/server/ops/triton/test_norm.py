"""RMSNorm with a weight per row and SiLU times up, against float64 and Hugging Face."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton")

from server.ops import norm as torch_norm
from server.ops.norm import RmsForm
from server.ops.triton.norm import add_rms_norm, rms_norm, silu_mul
from tests.server.ops.triton.helpers import generator


def form_of(offset: float) -> RmsForm:
    """The form that the kernel has with this offset."""
    return RmsForm(1e-5, offset, casts_first=offset == 0.0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 48), (4, 3, 20), (1, 64)])
def test_rms_norm_uses_each_rows_own_weight(shape: tuple[int, ...], offset: float) -> None:
    n = shape[-1]
    x = torch.randn(shape, generator=generator(0))
    vectors = torch.randn(4, n, generator=generator(1))
    vectors[2] = float("nan")  # a slot nobody uses
    place = torch.tensor([0, 3, 1, 0, 3])[: shape[0]]
    got = rms_norm(x, vectors, place, 1e-5, offset=offset)
    for row in range(shape[0]):
        wide = x[row].double()
        normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        want = normal * (vectors[place[row]].double() + offset)
        torch.testing.assert_close(got[row].double(), want, rtol=1e-5, atol=1e-6)
    reference = torch_norm.rms_norm(x, vectors, place, form_of(offset))
    torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 48), (4, 3, 20), (1, 300)])
def test_add_rms_norm_gives_the_bits_of_both_operations(
    shape: tuple[int, ...], offset: float
) -> None:
    x, residual = torch.randn(2, *shape, generator=generator(0))
    vectors = torch.randn(4, shape[-1], generator=generator(1))
    place = torch.tensor([0, 3, 1, 0, 3])[: shape[0]]
    normed, summed = add_rms_norm(x, residual, vectors, place, 1e-5, offset=offset)
    assert torch.equal(summed, residual + x)
    assert torch.equal(normed, rms_norm(residual + x, vectors, place, 1e-5, offset=offset))
    reference = torch_norm.rms_norm(summed.double(), vectors, place, form_of(offset))
    torch.testing.assert_close(normed.double(), reference, rtol=1e-5, atol=1e-6)


def test_add_rms_norm_slices_of_wider_tensors_are_read_in_place() -> None:
    whole = torch.randn(2, 5, 70, generator=generator(0))
    x, residual = whole[:, :, 3:35]
    vectors, place = torch.ones(1, 32), torch.zeros(5, dtype=torch.int64)
    normed, summed = add_rms_norm(x, residual, vectors, place, 1e-5)
    assert torch.equal(summed, residual + x)
    want = torch_norm.rms_norm(summed, vectors, place, form_of(0.0))
    torch.testing.assert_close(normed, want)


def test_add_rms_norm_bfloat16_norms_the_rounded_sum() -> None:
    """The interpreter truncates where a GPU rounds: one step of difference, then the same sum."""
    x, residual = torch.randn(2, 6, 64, generator=generator(0)).to(torch.bfloat16)
    vectors, place = torch.ones(1, 64).to(torch.bfloat16), torch.zeros(6, dtype=torch.int64)
    normed, summed = add_rms_norm(x, residual, vectors, place, 1e-5)
    torch.testing.assert_close(summed, residual + x, rtol=2**-7, atol=0)
    assert torch.equal(normed, rms_norm(summed, vectors, place, 1e-5))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_torch_rms_norm_equals_the_model_definition_in_bfloat16(
    kind: type[torch.nn.Module],
) -> None:
    norm = kind(32, eps=1e-5).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(6, 32, generator=generator(0)).to(torch.bfloat16)
    offset = 1.0 if kind is GemmaRMSNorm else 0.0
    vectors, place = norm.weight.data.unsqueeze(0), torch.zeros(6, dtype=torch.int64)
    got = torch_norm.rms_norm(x, vectors, place, form_of(offset))
    assert torch.equal(got, norm(x))


@pytest.mark.parametrize("width", [24, 1030])
def test_silu_mul_equals_float64(width: int) -> None:
    fused = torch.randn(3, 2 * width, generator=generator(2)) * 3
    gate, up = fused.double().chunk(2, dim=1)
    want = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(
        silu_mul(*fused.chunk(2, dim=1)).double(), want, rtol=1e-5, atol=1e-6
    )
