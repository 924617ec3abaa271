"""Pool of KV cache pages, shared between requests that begin with the same tokens.

A full page whose content is known is found by its chain: the cache key of everything that
determines keys and values (variant digest and mode, tenant salt), the page before it, and its own
tokens. Tokens are compared on a hit, never only hashed. A page that nobody holds stays findable
until its memory is needed; the least recently released goes first.

Page 0 is never given out: padding points there and it stays zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NEVER = 1 << 62  # more pages than there will ever be
ROOT = 0  # parent of a first page; no real page has this id
# (key, parent page, tokens): compared whole by the dictionary, so a hash collision is no hit.
Chain = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Tokens looked up and found, since the start."""

    n_queried: int
    n_hit: int


class PagePool:
    """Reference-counted pages of `page_tokens` tokens each. Engine thread only."""

    def __init__(self, n_pages: int, page_tokens: int, *, reuse: bool = True) -> None:
        self.page_tokens = page_tokens
        self.n_pages = n_pages - 1
        self._reuse = reuse
        self._free = list(range(n_pages - 1, 0, -1))
        self._refs = [0] * n_pages
        self._by_chain: dict[Chain, int] = {}
        self._chains: dict[int, Chain] = {}
        self._children: dict[int, set[int]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, held by nobody
        self._n_queried = 0
        self._n_hit = 0

    @property
    def n_free(self) -> int:
        """Pages that a request could get now, those that are merely remembered included."""
        return len(self._free) + len(self._idle)

    @property
    def counts(self) -> CacheCounts:
        return CacheCounts(self._n_queried, self._n_hit)

    def needed(self, n_tokens: int) -> int:
        """Pages that hold `n_tokens`."""
        return -(-n_tokens // self.page_tokens)

    def grow(self, pages: list[int], n_tokens: int) -> bool:
        """Extend `pages` to hold `n_tokens`; False (and nothing changed) if that is impossible."""
        missing = self.needed(n_tokens) - len(pages)
        if missing > self.n_free:
            return False
        for _ in range(missing):
            pages.append(self._take())
        return True

    def release(self, pages: list[int]) -> None:
        """Give pages back and empty the list."""
        for page in reversed(pages):  # the end of a chain is forgotten before its beginning
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._chains:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        pages.clear()

    def match(self, key: str, tokens: Sequence[int]) -> list[int]:
        """Hold and return the pages of the longest known beginning of `tokens`.

        At least one token is always left to compute: its logits are wanted.
        """
        if not self._reuse:
            return []
        self._n_queried += len(tokens)
        pages = list(self._known(key, tokens))
        for page in pages:
            self._idle.pop(page, None)
            self._refs[page] += 1
        self._n_hit += len(pages) * self.page_tokens
        return pages

    def n_known(self, key: str, tokens: Sequence[int]) -> int:
        """How many tokens `match` would find now; holds and counts nothing."""
        return self.page_tokens * sum(1 for _ in self._known(key, tokens)) if self._reuse else 0

    def _known(self, key: str, tokens: Sequence[int]) -> Iterator[int]:
        parent = ROOT
        for start in range(0, len(tokens) - self.page_tokens, self.page_tokens):
            chunk = tuple(tokens[start : start + self.page_tokens])
            page = self._by_chain.get((key, parent, chunk))
            if page is None:
                return
            yield page
            parent = page

    def remember(
        self, key: str, tokens: Sequence[int], pages: Sequence[int], n_known: int, n_full: int
    ) -> int:
        """Make the full pages ``[n_known, n_full)`` findable; returns how many now are settled.

        A page is findable only if the one before it is. Where another request computed the same
        page first, this request's copy and all that follows stay private: they count as settled.
        """
        if not self._reuse:
            return NEVER
        parent = pages[n_known - 1] if n_known else ROOT
        for i in range(n_known, n_full):
            chain = (key, parent, tuple(tokens[i * self.page_tokens : (i + 1) * self.page_tokens]))
            if chain in self._by_chain or (parent != ROOT and parent not in self._chains):
                return NEVER
            self._by_chain[chain] = pages[i]
            self._chains[pages[i]] = chain
            self._children.setdefault(parent, set()).add(pages[i])
            parent = pages[i]
        return n_full

    def private(self, pages: Sequence[int]) -> list[int]:
        """Those of `pages` that nobody else holds or can find."""
        return [p for p in pages if self._refs[p] == 1 and p not in self._chains]

    def _take(self) -> int:
        if not self._free:
            self._forget(next(iter(self._idle)))
        page = self._free.pop()
        self._refs[page] = 1
        return page

    def _forget(self, page: int) -> None:
        """Drop a page's chain and all chains through it: a new owner must not be found by them."""
        stack = [page]
        while stack:
            current = stack.pop()
            stack.extend(self._children.pop(current, ()))
            chain = self._chains.pop(current, None)
            if chain is None:
                continue
            del self._by_chain[chain]
            siblings = self._children.get(chain[1])
            if siblings is not None:
                siblings.discard(current)
            if current in self._idle:
                del self._idle[current]
                self._free.append(current)
