"""What a pool keeps of its terms goes with them."""

from __future__ import annotations

import pytest
import torch

from server.ops.kernels import TorchKernels
from tests.server.deltas.pools.test_geometry import (
    CASES,
    encode_all,
    fill,
    mapping_of,
    put,
    reserve,
)


@pytest.mark.parametrize(("codec", "options", "shape"), CASES)
def test_pool_embedding_look_up_after_its_place_changed_hands_is_the_new_variants(
    codec: str, options: dict[str, object], shape: tuple[int, int]
) -> None:
    variants = encode_all(codec, options, shape)
    ids, mapping = torch.arange(4), mapping_of({0: 4})
    for t in range(len(variants[0])):
        pool = fill(t, variants[:1], TorchKernels())
        pool.add_rows_(torch.zeros(4, shape[1]), ids, mapping)
        pool.hide(0)
        staged = pool.stage(variants[1][t])
        reserve(pool, 0, staged)
        put(pool, 0, staged)
        pool.show(0)
        y = torch.zeros(4, shape[1])
        pool.add_rows_(y, ids, mapping)
        want = variants[1][t].to_dense()[ids]
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-7)
