"""Model shapes and what a decode step must read at least."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.codecs.columns import packed_rows


@dataclass(frozen=True)
class Group:
    """Linears that read one input: `sizes` outputs each, `n` inputs."""

    name: str
    n: int
    sizes: tuple[int, ...]

    @property
    def base_bytes(self) -> int:
        return 2 * self.n * sum(self.sizes)

    @property
    def base_bytes_8bit(self) -> int:
        return self.n * sum(self.sizes) + 4 * sum(self.sizes)

    def delta_bytes(self, codec: Codec) -> int:
        """Codes and scales of one variant: what a decode step reads of it."""
        s, outputs = codec.n_blocks, sum(-(-m // codec.n_blocks) for m in self.sizes)
        element = 2 if codec.bits == 16 else 1
        return s * outputs * (element * packed_rows(-(-self.n // s), codec.bits) + 2)


@dataclass(frozen=True)
class Codec:
    """A blockdiag setting; its ratio without scales is ``16 n_blocks / bits``."""

    bits: int
    n_blocks: int

    @property
    def name(self) -> str:
        return f"{self.bits} bit, s = {self.n_blocks}"

    @property
    def ratio(self) -> int:
        return 16 * self.n_blocks // self.bits


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int

    def groups(self) -> tuple[Group, ...]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Group("qkv", self.hidden, (q, kv, kv)),
            Group("o", q, (self.hidden,)),
            Group("gate_up", self.hidden, (self.intermediate, self.intermediate)),
            Group("down", self.intermediate, (self.hidden,)),
        )

    def base_bytes(self) -> int:
        """bfloat16 linears and lm_head: what a decode step reads of the base."""
        layer = sum(group.base_bytes for group in self.groups())
        return self.layers * layer + 2 * self.hidden * self.vocab

    def vocabulary(self) -> Group:
        """lm_head, and the embedding's shape."""
        return Group("lm_head", self.hidden, (self.vocab,))

    def base_bytes_8bit(self) -> int:
        """The same with 8-bit linears and their float32 scales; lm_head stays as it is."""
        layer = sum(group.base_bytes_8bit for group in self.groups())
        return self.layers * layer + self.vocabulary().base_bytes

    def resident_base_bytes_8bit(self) -> int:
        """Device memory of that base, the embedding included."""
        return self.base_bytes_8bit() + self.vocabulary().base_bytes

    def delta_bytes(self, codec: Codec) -> int:
        """What a decode step reads for one variant: every linear of every layer."""
        return self.layers * sum(group.delta_bytes(codec) for group in self.groups())

    def kv_bytes(self, tokens: int) -> int:
        """bfloat16 keys and values of `tokens` positions, all layers."""
        return self.layers * tokens * 2 * 2 * self.kv_heads * self.head_dim


LLAMA_8B = ModelShape("Llama-3-8B", 4096, 14336, 32, 8, 128, 32, 128256)
TINY = ModelShape("tiny", 64, 96, 4, 2, 16, 2, 128)
