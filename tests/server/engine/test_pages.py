"""Page accounting against a set model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.pages import PagePool


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
