"""Page accounting and prefix reuse against plain models."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.schedule.pages import PagePool

PAGE = 4


def test_grow_more_than_free_changes_nothing() -> None:
    pool = PagePool(4, 16)
    pages: list[int] = []
    assert not pool.grow(pages, 16 * 4)
    assert pages == []
    assert pool.n_free == 3


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70)), max_size=40))
def test_grow_and_release_any_order_never_share_a_page_or_give_out_page_zero(
    operations: list[tuple[int, int]],
) -> None:
    pool = PagePool(12, 16)
    owners: list[list[int]] = [[] for _ in range(4)]
    for owner, n_tokens in operations:
        if n_tokens % 7 == 0:
            pool.release(owners[owner])
        else:
            pool.grow(owners[owner], n_tokens)
        used = [page for pages in owners for page in pages]
        assert len(used) == len(set(used))
        assert 0 not in used
        assert len(used) + pool.n_free == pool.n_pages


def computed(pool: PagePool, key: str, tokens: list[int]) -> list[int]:
    """Serve a request: match, grow, remember. Returns its pages, still held."""
    pages = pool.match(key, tokens)
    n_matched = len(pages)
    assert pool.grow(pages, len(tokens))
    pool.remember(key, tokens, pages, n_matched, len(tokens) // PAGE)
    return pages


def test_match_same_beginning_shares_full_pages_but_leaves_one_token() -> None:
    pool = PagePool(20, PAGE)
    first = computed(pool, "a", list(range(8)))
    assert pool.match("a", list(range(8))) == first[:1]
    assert pool.match("a", [*range(8), 9]) == first[:2]
    assert pool.match("a", [*range(4), 99, 99, 99, 99, 99]) == first[:1]


def test_match_other_variant_or_salt_never_hits() -> None:
    pool = PagePool(20, PAGE)
    computed(pool, "a", list(range(9)))
    assert pool.match("b", list(range(9))) == []


def test_match_same_page_tokens_after_another_beginning_never_hits() -> None:
    pool = PagePool(20, PAGE)
    computed(pool, "a", [1, 1, 1, 1, 2, 2, 2, 2, 0])
    assert len(pool.match("a", [2, 2, 2, 2, 1, 1, 1, 1, 0])) == 0


def test_take_evicted_parent_makes_its_children_unfindable() -> None:
    pool = PagePool(4, PAGE)
    pages = computed(pool, "a", list(range(12)))
    first = pages[0]
    pool.release(pages)
    assert pool.n_free == 3
    other: list[int] = []
    assert pool.grow(other, 12)  # takes everything, the remembered pages included
    assert sorted(other) == [1, 2, 3]
    pool.release(other)
    assert pool.match("a", list(range(12))) == []
    assert first in range(1, 4)


def test_remember_page_after_a_private_one_stays_private() -> None:
    pool = PagePool(20, PAGE)
    mine, other = pool.match("a", list(range(9))), pool.match("a", list(range(9)))
    for pages in (mine, other):  # both computed the same at the same time
        assert pool.grow(pages, 9)
    assert pool.remember("a", list(range(9)), mine, 0, 2) == 2
    assert pool.remember("a", list(range(9)), other, 0, 2) > 2
    assert pool.private(other) == other
    pool.release(other)
    assert pool.match("a", list(range(9))) == mine[:2]


def test_match_reuse_switched_off_finds_nothing() -> None:
    pool = PagePool(20, PAGE, reuse=False)
    computed(pool, "a", list(range(8)))
    assert pool.match("a", list(range(8))) == []


requests = st.tuples(
    st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=14), st.booleans()
)


@given(st.lists(requests, max_size=40))
def test_match_any_history_finds_only_pages_with_the_same_past(
    history: list[tuple[str, list[int], bool]],
) -> None:
    """A model of the memory: what each page holds is the whole past up to its end."""
    pool = PagePool(8, PAGE)
    content: dict[int, tuple[str, tuple[int, ...]]] = {}
    held: list[list[int]] = []
    for key, tokens, keep in history:
        pages = pool.match(key, tokens)
        for i, page in enumerate(pages):
            assert content[page] == (key, tuple(tokens[: (i + 1) * PAGE]))
        assert len(pages) * PAGE < len(tokens)
        n_matched = len(pages)
        if not pool.grow(pages, len(tokens)):
            pool.release(pages)
            continue
        for i in range(n_matched, len(pages)):
            assert all(pages[i] not in other for other in held)
            content[pages[i]] = (key, tuple(tokens[: (i + 1) * PAGE]))
        pool.remember(key, tokens, pages, n_matched, len(tokens) // PAGE)
        held.append(pages)
        if not keep:
            pool.release(held.pop(0))
        in_use = {page for pages in held for page in pages}
        assert len(in_use) + pool.n_free == pool.n_pages
