"""No request ever gets another variant's tokens, whatever comes, goes and is evicted around it.

The oracle's texts of all variants differ within eight tokens, so a foreign delta, KV block or slot
shows without any tolerance.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.server.conftest import ALL_CODECS, N_TRUTH, Served
from tests.server.helpers import CoreHarness, Recorded

NAMES = ["base", *ALL_CODECS]
# Some begin alike, so that KV blocks are shared within a variant (and must not be across variants).
PROMPTS = [
    "The quick brown fox jumps over the lazy dog",
    "The quick brown fox jumps over the lazy cat",
    "x",
    "book a table",
]
N_ACTIONS = 150


@pytest.mark.parametrize("seed", range(2))
def test_random_submit_abort_and_evict_never_mixes_owners(
    served: Callable[..., Served], harness: Callable[..., CoreHarness], seed: int
) -> None:
    many = served("llama", ALL_CODECS)
    block_bytes = harness(many).core._runner.base.store.bytes_per_token() * 8
    engine = harness(
        many,
        max_resident_variants=2,
        max_variants_per_step=3,
        max_num_seqs=6,
        max_batch_tokens=24,
        kv_block_tokens=8,
        kv_cache_bytes=block_bytes * 14,
    )
    rng = random.Random(seed)
    sent: list[Recorded] = []
    aborted: set[Recorded] = set()
    for _ in range(N_ACTIONS):
        action = rng.random()
        if action < 0.35:
            n = rng.randint(1, N_TRUTH)
            sent.append(engine.submit(rng.choice(NAMES), rng.choice(PROMPTS), max_tokens=n))
        elif action < 0.45 and sent:
            victim = rng.choice(sent)
            if not victim.done:
                aborted.add(victim)
            engine.core.abort(victim.request)
        else:
            engine.core.turn()
    engine.run(*(one for one in sent if one not in aborted))
    engine.assert_idle()
    assert engine.core.stats().n_preemptions > 0
    for one in sent:
        want = many.truth(one.request.variant.name, one.request.prompt_ids)
        want = want[: one.request.params.max_tokens]
        assert one.error is None
        assert one.output_ids == want[: len(one.output_ids)]
        if one not in aborted:
            assert one.output_ids == want


def test_canaries_differ_within_eight_tokens(served: Callable[..., Served]) -> None:
    """The check above would be blind to variants that write the same."""
    many = served("llama", ALL_CODECS)
    engine = CoreHarness(many.base)
    ids = engine.encode(engine.catalog.open("base"), PROMPTS[0])
    engine.close()
    texts = [tuple(many.truth(name, ids)[:8]) for name in NAMES]
    assert len(set(texts)) == len(NAMES)
