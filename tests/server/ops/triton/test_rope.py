"""RoPE and KV write against Hugging Face's rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytest.importorskip("triton")

from server.ops.attention import Rotary, rotate, write_cache_
from server.ops.triton.rope import rope_and_write_
from tests.server.ops.triton.helpers import CANARY, generator


def torch_rope_and_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
) -> None:
    """`server.ops.attention`'s two halves; it has no rows of padding, so those are left out."""
    kept, rotary = cache_rows >= 0, Rotary(cos, sin)
    q.copy_(rotate(q, rotary, torch.float32))
    write_cache_(k_cache, rotate(k, rotary, torch.float32)[kept], cache_rows[kept])
    write_cache_(v_cache, v[kept], cache_rows[kept])


@pytest.mark.parametrize(("dim", "rotated"), [(16, 16), (24, 8)])
@pytest.mark.parametrize("write", [rope_and_write_, torch_rope_and_write_])
def test_rotation_and_places_equal_hugging_face(write: object, dim: int, rotated: int) -> None:
    tokens, heads, kv_heads = 5, 4, 2
    width = (heads + 2 * kv_heads) * dim
    fused = torch.randn(
        tokens, width, generator=generator(0)
    )  # q, k, v side by side, as in a group
    q, k, v = (
        part.view(tokens, -1, dim)
        for part in fused.clone().split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    )
    angle = torch.rand(tokens, rotated // 2, generator=generator(1)) * 6
    angle = torch.cat([angle, angle], dim=1)
    cos, sin = angle.cos(), angle.sin()
    before = q.clone()
    k_cache = torch.full((3, 4, kv_heads, dim), CANARY)
    v_cache = k_cache.clone()
    cache_rows = torch.tensor([7, 0, -1, 11, 3])
    write(q, k, v, cos, sin, k_cache, v_cache, cache_rows)  # type: ignore[operator]
    turned_q, turned_k = apply_rotary_pos_emb(
        before[..., :rotated].double().transpose(0, 1).unsqueeze(0),
        k[..., :rotated].double().transpose(0, 1).unsqueeze(0),
        cos.double().unsqueeze(0),
        sin.double().unsqueeze(0),
    )
    want_q = torch.cat([turned_q[0].transpose(0, 1), before[..., rotated:].double()], dim=-1)
    want_k = torch.cat([turned_k[0].transpose(0, 1), k[..., rotated:].double()], dim=-1)
    torch.testing.assert_close(q.double(), want_q, rtol=1e-5, atol=1e-6)
    flat_k, flat_v = k_cache.view(12, kv_heads, dim), v_cache.view(12, kv_heads, dim)
    for token, cache_row in enumerate(cache_rows.tolist()):
        if cache_row >= 0:
            torch.testing.assert_close(
                flat_k[cache_row].double(), want_k[token], rtol=1e-5, atol=1e-6
            )
            assert torch.equal(flat_v[cache_row], v[token])
    untouched = [i for i in range(12) if i not in cache_rows.tolist()]
    assert bool((flat_k[untouched] == CANARY).all())
    assert bool((flat_v[untouched] == CANARY).all())
