"""KV block accounting and prefix reuse against plain models."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.schedule.kv_blocks import KVBlockPool

BLOCK_TOKENS = 4


def test_grow_more_than_free_changes_nothing() -> None:
    pool = KVBlockPool(4, 16)
    kv_blocks: list[int] = []
    assert not pool.grow(kv_blocks, 16 * 4)
    assert kv_blocks == []
    assert pool.n_free == 3


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70)), max_size=40))
def test_grow_and_release_any_order_never_share_a_kv_block_or_give_out_kv_block_zero(
    operations: list[tuple[int, int]],
) -> None:
    pool = KVBlockPool(12, 16)
    owners: list[list[int]] = [[] for _ in range(4)]
    for owner, n_tokens in operations:
        if n_tokens % 7 == 0:
            pool.release(owners[owner])
        else:
            pool.grow(owners[owner], n_tokens)
        used = [kv_block for kv_blocks in owners for kv_block in kv_blocks]
        assert len(used) == len(set(used))
        assert 0 not in used
        assert len(used) + pool.n_free == pool.n_kv_blocks


def computed(pool: KVBlockPool, key: str, tokens: list[int]) -> list[int]:
    """Serve a request: match, grow, remember. Returns its KV blocks, still held."""
    kv_blocks = pool.match(key, tokens)
    n_matched = len(kv_blocks)
    assert pool.grow(kv_blocks, len(tokens))
    pool.remember(key, tokens, kv_blocks, n_matched, len(tokens) // BLOCK_TOKENS)
    return kv_blocks


def test_match_same_beginning_shares_full_kv_blocks_but_leaves_one_token() -> None:
    pool = KVBlockPool(20, BLOCK_TOKENS)
    first = computed(pool, "a", list(range(8)))
    assert pool.match("a", list(range(8))) == first[:1]
    assert pool.match("a", [*range(8), 9]) == first[:2]
    assert pool.match("a", [*range(4), 99, 99, 99, 99, 99]) == first[:1]


def test_match_other_variant_or_salt_never_hits() -> None:
    pool = KVBlockPool(20, BLOCK_TOKENS)
    computed(pool, "a", list(range(9)))
    assert pool.match("b", list(range(9))) == []


def test_match_same_kv_block_tokens_after_another_beginning_never_hits() -> None:
    pool = KVBlockPool(20, BLOCK_TOKENS)
    computed(pool, "a", [1, 1, 1, 1, 2, 2, 2, 2, 0])
    assert len(pool.match("a", [2, 2, 2, 2, 1, 1, 1, 1, 0])) == 0


def test_take_evicted_parent_makes_its_children_unfindable() -> None:
    pool = KVBlockPool(4, BLOCK_TOKENS)
    kv_blocks = computed(pool, "a", list(range(12)))
    first = kv_blocks[0]
    pool.release(kv_blocks)
    assert pool.n_free == 3
    other: list[int] = []
    assert pool.grow(other, 12)  # takes everything, the remembered KV blocks included
    assert sorted(other) == [1, 2, 3]
    pool.release(other)
    assert pool.match("a", list(range(12))) == []
    assert first in range(1, 4)


def test_remember_kv_block_after_a_private_one_stays_private() -> None:
    pool = KVBlockPool(20, BLOCK_TOKENS)
    mine, other = pool.match("a", list(range(9))), pool.match("a", list(range(9)))
    for kv_blocks in (mine, other):  # both computed the same at the same time
        assert pool.grow(kv_blocks, 9)
    assert pool.remember("a", list(range(9)), mine, 0, 2) == 2
    assert pool.remember("a", list(range(9)), other, 0, 2) > 2
    assert pool.private(other) == other
    pool.release(other)
    assert pool.match("a", list(range(9))) == mine[:2]


def test_match_reuse_switched_off_finds_nothing() -> None:
    pool = KVBlockPool(20, BLOCK_TOKENS, reuse=False)
    computed(pool, "a", list(range(8)))
    assert pool.match("a", list(range(8))) == []


requests = st.tuples(
    st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=14), st.booleans()
)


@given(st.lists(requests, max_size=40))
def test_match_any_history_finds_only_kv_blocks_with_the_same_past(
    history: list[tuple[str, list[int], bool]],
) -> None:
    """A model of the memory: what each KV block holds is the whole past up to its end."""
    pool = KVBlockPool(8, BLOCK_TOKENS)
    content: dict[int, tuple[str, tuple[int, ...]]] = {}
    held: list[list[int]] = []
    for key, tokens, keep in history:
        kv_blocks = pool.match(key, tokens)
        for i, kv_block in enumerate(kv_blocks):
            assert content[kv_block] == (key, tuple(tokens[: (i + 1) * BLOCK_TOKENS]))
        assert len(kv_blocks) * BLOCK_TOKENS < len(tokens)
        n_matched = len(kv_blocks)
        if not pool.grow(kv_blocks, len(tokens)):
            pool.release(kv_blocks)
            continue
        for i in range(n_matched, len(kv_blocks)):
            assert all(kv_blocks[i] not in other for other in held)
            content[kv_blocks[i]] = (key, tuple(tokens[: (i + 1) * BLOCK_TOKENS]))
        pool.remember(key, tokens, kv_blocks, n_matched, len(tokens) // BLOCK_TOKENS)
        held.append(kv_blocks)
        if not keep:
            pool.release(held.pop(0))
        in_use = {kv_block for kv_blocks in held for kv_block in kv_blocks}
        assert len(in_use) + pool.n_free == pool.n_kv_blocks
