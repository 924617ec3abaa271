"""Pool of KV cache pages. Page 0 is never given out: padding points there and it stays zero."""

from __future__ import annotations


class PagePool:
    """Free list of pages of `page_tokens` tokens each. Engine thread only."""

    def __init__(self, n_pages: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.n_pages = n_pages - 1
        self._free = list(range(n_pages - 1, 0, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def needed(self, n_tokens: int) -> int:
        """Pages that hold `n_tokens`."""
        return -(-n_tokens // self.page_tokens)

    def grow(self, pages: list[int], n_tokens: int) -> bool:
        """Extend `pages` to hold `n_tokens`; False (and nothing changed) if that is impossible."""
        missing = self.needed(n_tokens) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def release(self, pages: list[int]) -> None:
        """Give pages back and empty the list."""
        self._free.extend(reversed(pages))
        pages.clear()
