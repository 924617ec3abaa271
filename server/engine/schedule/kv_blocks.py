"""Pool of KV blocks, shared between requests that begin with the same tokens.

A full KV block whose content is known is found by its chain: the cache key of everything that
determines keys and values (variant digest and mode, tenant salt), the KV block before it, and its
own tokens. Tokens are compared on a hit, never only hashed. A KV block that nobody holds stays
findable until its memory is needed; the least recently released goes first.

KV block 0 is never given out: padding points there and it stays zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NEVER = 1 << 62  # more KV blocks than there will ever be
ROOT = 0  # parent of a first KV block; no real KV block has this id
# (key, parent KV block, tokens): compared whole by the dictionary, so a hash collision is no hit.
Chain = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Tokens looked up and found, since the start."""

    n_queried: int
    n_hit: int


class KVBlockPool:
    """Reference-counted KV blocks of `block_tokens` tokens each. Engine thread only."""

    def __init__(self, n_kv_blocks: int, block_tokens: int, *, reuse: bool = True) -> None:
        self.block_tokens = block_tokens
        self.n_kv_blocks = n_kv_blocks - 1
        self._reuse = reuse
        self._free = list(range(n_kv_blocks - 1, 0, -1))
        self._refs = [0] * n_kv_blocks
        self._by_chain: dict[Chain, int] = {}
        self._chains: dict[int, Chain] = {}
        self._children: dict[int, set[int]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, held by nobody
        self._n_queried = 0
        self._n_hit = 0

    @property
    def n_free(self) -> int:
        """KV blocks that a request could get now, those that are merely remembered included."""
        return len(self._free) + len(self._idle)

    @property
    def counts(self) -> CacheCounts:
        return CacheCounts(self._n_queried, self._n_hit)

    def needed(self, n_tokens: int) -> int:
        """KV blocks that hold `n_tokens`."""
        return -(-n_tokens // self.block_tokens)

    def grow(self, kv_blocks: list[int], n_tokens: int) -> bool:
        """Extend `kv_blocks` to hold `n_tokens`; False (and nothing changed) if that cannot be."""
        missing = self.needed(n_tokens) - len(kv_blocks)
        if missing > self.n_free:
            return False
        for _ in range(missing):
            kv_blocks.append(self._take())
        return True

    def release(self, kv_blocks: list[int]) -> None:
        """Give KV blocks back and empty the list."""
        for kv_block in reversed(kv_blocks):  # the end of a chain is forgotten before its beginning
            self._refs[kv_block] -= 1
            if self._refs[kv_block] == 0:
                if kv_block in self._chains:
                    self._idle[kv_block] = None
                else:
                    self._free.append(kv_block)
        kv_blocks.clear()

    def match(self, key: str, tokens: Sequence[int]) -> list[int]:
        """Hold and return the KV blocks of the longest known beginning of `tokens`.

        At least one token is always left to compute: its logits are wanted.
        """
        if not self._reuse:
            return []
        self._n_queried += len(tokens)
        kv_blocks = list(self._known(key, tokens))
        for kv_block in kv_blocks:
            self._idle.pop(kv_block, None)
            self._refs[kv_block] += 1
        self._n_hit += len(kv_blocks) * self.block_tokens
        return kv_blocks

    def n_known(self, key: str, tokens: Sequence[int]) -> int:
        """How many tokens `match` would find now; holds and counts nothing."""
        return self.block_tokens * sum(1 for _ in self._known(key, tokens)) if self._reuse else 0

    def _known(self, key: str, tokens: Sequence[int]) -> Iterator[int]:
        parent = ROOT
        for start in range(0, len(tokens) - self.block_tokens, self.block_tokens):
            chunk = tuple(tokens[start : start + self.block_tokens])
            kv_block = self._by_chain.get((key, parent, chunk))
            if kv_block is None:
                return
            yield kv_block
            parent = kv_block

    def remember(
        self, key: str, tokens: Sequence[int], kv_blocks: Sequence[int], n_known: int, n_full: int
    ) -> int:
        """Make the full KV blocks ``[n_known, n_full)`` findable; returns how many now are settled.

        A KV block is findable only if the one before it is. Where another request computed the
        same one first, this request's copy and all that follows stay private: they count as
        settled.
        """
        if not self._reuse:
            return NEVER
        parent = kv_blocks[n_known - 1] if n_known else ROOT
        for i in range(n_known, n_full):
            chain = (
                key,
                parent,
                tuple(tokens[i * self.block_tokens : (i + 1) * self.block_tokens]),
            )
            if chain in self._by_chain or (parent != ROOT and parent not in self._chains):
                return NEVER
            self._by_chain[chain] = kv_blocks[i]
            self._chains[kv_blocks[i]] = chain
            self._children.setdefault(parent, set()).add(kv_blocks[i])
            parent = kv_blocks[i]
        return n_full

    def private(self, kv_blocks: Sequence[int]) -> list[int]:
        """Those of `kv_blocks` that nobody else holds or can find."""
        return [p for p in kv_blocks if self._refs[p] == 1 and p not in self._chains]

    def _take(self) -> int:
        if not self._free:
            self._forget(next(iter(self._idle)))
        kv_block = self._free.pop()
        self._refs[kv_block] = 1
        return kv_block

    def _forget(self, kv_block: int) -> None:
        """Drop a KV block's chain and all chains through it: a new owner must not be found so."""
        stack = [kv_block]
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
