"""The KV cache of all layers, as the attention modules use it.

A layer is one call of the attention function: a module may call it several times in a step
(differential attention does), and a model may run one module several times (recurrent depth). Which
calls there are a probing forward pass shows; every step must then make the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from server.errors import EngineError
from server.model.mask import HandedMask, MaskForm
from server.ops.attention import (
    AttentionCall,
    AttentionKernels,
    AttentionMetadata,
    HeadNorm,
    Rotary,
    paged_attention,
)


@dataclass(slots=True)
class LayerKVBlocks:
    """One layer's KV blocks: k ``[n_kv_blocks, block_tokens, Hkv, D]``, v ``[.., Hkv, Dv]``."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What of one call is the same in every step, as the module hands it on.

    scale, softcap  see `AttentionCall`
    window          the module's own word, which is compared only: see `Layer.mask`
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class ProbedCall:
    """What a module handed to the attention function in the probing forward pass.

    q [1, H, T, D]; k [1, Hkv, T, D]; v [1, Hkv, T, Dv]; sinks [H]
    """

    q: Tensor
    k: Tensor
    v: Tensor
    form: AttentionForm
    sinks: Tensor | None = None

    def layer(self, mask: MaskForm) -> Layer:
        kv_heads, widths = self.k.shape[1], (self.k.shape[3], self.v.shape[3])
        return Layer(kv_heads, *widths, self.k.dtype, self.form, mask, self.sinks is not None)

    def stand_in(self) -> Tensor:
        """``[1, T, H, Dv]`` instead of what attention would give: q, if it fits."""
        if self.v.shape[3] == self.q.shape[3]:
            return self.q.transpose(1, 2)
        return self.v.repeat_interleave(self.q.shape[1] // self.v.shape[1], 1).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Layer:
    """What is known of one layer: KV heads, their widths, the cache's dtype, what tokens see."""

    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    form: AttentionForm
    mask: MaskForm
    has_sinks: bool = False

    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_width + self.value_width) * self.dtype.itemsize

    def takes(self, qkv: tuple[Tensor, Tensor, Tensor], n_rows: int) -> bool:
        """Whether these are n rows of it."""
        q, k, v = (x.shape for x in qkv)
        wanted = (n_rows, self.kv_heads, self.key_width), (n_rows, self.kv_heads, self.value_width)
        return (k, v) == wanted and (q[0], q[2]) == (n_rows, self.key_width)


@dataclass(slots=True)
class KVStore:
    """All layers' KV blocks and the metadata of the step in progress.

    layers     by module, in the order of its calls in a step
    seen       what the last probing pass saw; for those who prepare the model
    masks      by module, as `layers`: of the pass in which transformers handed them over
    forms      of the masks that were handed over, which layers share
    kv_blocks  by module, as `layers`
    n_positions  sequences have so many tokens at most
    sinks      by module, what gives those of the step's rows, if variants may change them
    """

    kernels: AttentionKernels
    n_positions: int = 2048
    metadata: AttentionMetadata | None = None
    layers: dict[nn.Module, list[Layer]] = field(default_factory=dict)
    seen: dict[nn.Module, list[ProbedCall]] = field(default_factory=dict)
    masks: dict[nn.Module, list[MaskForm]] = field(default_factory=dict)
    forms: dict[HandedMask, MaskForm] = field(default_factory=dict)
    sinks: dict[nn.Module, Callable[[], Tensor]] = field(default_factory=dict)
    kv_blocks: dict[nn.Module, list[LayerKVBlocks]] = field(default_factory=dict)
    n_kv_blocks: int = 0
    block_tokens: int = 0
    is_probing: bool = False
    _n_calls: dict[tuple[nn.Module, int], int] = field(default_factory=dict)

    def __deepcopy__(self, _: object) -> KVStore:
        """Itself: whoever copies a module that has found the store means the module."""
        return self

    @contextmanager
    def probing(self) -> Iterator[None]:
        """A forward pass in which the attention function learns the layers and returns q."""
        self.layers.clear()
        self.seen.clear()
        self.is_probing = True
        try:
            yield
        finally:
            self.is_probing = False

    def wants_mask(self, module: nn.Module) -> bool:
        """Whether nothing is known yet of what tokens see in the module's next call."""
        return len(self.masks.get(module, ())) == len(self.layers.get(module, ()))

    def learn_mask(self, module: nn.Module, mask: MaskForm) -> None:
        """Note it; later passes hand over no masks."""
        self.masks.setdefault(module, []).append(mask)

    def probe(self, module: nn.Module, call: ProbedCall) -> None:
        """The module's next call of the probing pass, whose mask is known."""
        layers = self.layers.setdefault(module, [])
        layers.append(call.layer(self.masks[module][len(layers)]))
        self.seen.setdefault(module, []).append(call)

    @contextmanager
    def step(self, metadata: AttentionMetadata) -> Iterator[None]:
        """An engine step. Raises EngineError unless it makes exactly the calls that were probed."""
        self.metadata = metadata
        self._n_calls.clear()
        try:
            yield
            self._check_all_called()
        finally:
            self.metadata = None

    def _check_all_called(self) -> None:
        called = {module for module, _ in self._n_calls}
        as_often = (n == len(self.layers[module]) for (module, _), n in self._n_calls.items())
        if called != self.layers.keys() or not all(as_often):
            raise _other_calls()

    def attend(
        self,
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        form: AttentionForm,
        rotary: Rotary | None = None,
        norms: tuple[HeadNorm, HeadNorm] | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The module's next call in this step: q [T, H, D]; k [T, Hkv, D]; v [T, Hkv, Dv] ->
        [T, H, Dv]. Sinks that variants may change need not be given.

        Raises EngineError if it is none of those that were probed.
        """
        metadata = self.metadata
        assert metadata is not None, "attention called outside an engine step"
        # Who runs on parts of the rows makes the same calls for each of them.
        part = (module, metadata.first_row)
        ordinal = self._n_calls.get(part, 0)
        self._n_calls[part] = ordinal + 1
        layers = self.layers.get(module, [])
        if module in self.sinks:
            sinks = self.sinks[module]()
        # Kernels on addresses would read and write past the end of what does not fit.
        if ordinal >= len(layers) or not layers[ordinal].takes(qkv, len(metadata.cache_rows)):
            raise _other_calls()
        layer = layers[ordinal]
        if layer.form != form or layer.has_sinks != (sinks is not None):
            raise _other_calls()
        kv_blocks = self.kv_blocks[module][ordinal]
        call = AttentionCall(
            *qkv,
            kv_blocks.k,
            kv_blocks.v,
            metadata,
            form.scale,
            layer.mask.window,
            form.softcap,
            rotary=rotary,
            norms=norms,
            chunk=layer.mask.chunk,
            sinks=sinks,
        )
        return paged_attention(call, self.kernels)

    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token() for layers in self.layers.values() for layer in layers)

    def allocate(self, n_kv_blocks: int, block_tokens: int, device: torch.device) -> None:
        """Create the KV blocks: zeros, for padding is read (masked), so it must be finite."""
        self.n_kv_blocks, self.block_tokens = n_kv_blocks, block_tokens

        def blocks(layer: Layer, width: int) -> Tensor:
            shape = (n_kv_blocks, block_tokens, layer.kv_heads, width)
            return torch.zeros(shape, dtype=layer.dtype, device=device)

        for module, layers in self.layers.items():
            self.kv_blocks[module] = [
                LayerKVBlocks(blocks(layer, layer.key_width), blocks(layer, layer.value_width))
                for layer in layers
            ]

    def release(self) -> None:
        """Give the KV blocks' memory back; `allocate` makes others."""
        self.kv_blocks.clear()
        self.n_kv_blocks = self.block_tokens = 0

    def aside(self) -> KVStore:
        """Another of the same layers, without KV blocks: what lies in this one's stays."""
        return replace(self, metadata=None, kv_blocks={}, n_kv_blocks=0, _n_calls={})

    @contextmanager
    def blocks_of(self, other: KVStore) -> Iterator[None]:
        """Steps read and write the other's KV blocks meanwhile."""
        own = self.kv_blocks, self.n_kv_blocks, self.block_tokens
        self.kv_blocks, self.n_kv_blocks = other.kv_blocks, other.n_kv_blocks
        self.block_tokens = other.block_tokens
        try:
            yield
        finally:
            self.kv_blocks, self.n_kv_blocks, self.block_tokens = own

    def wipe(self, kv_blocks: list[int]) -> None:
        """Zero KV blocks that may hold NaN or infinity before somebody else gets them."""
        if not kv_blocks:
            return
        index = None  # on the layers' device: one copy for all
        for layer in self.all_kv_blocks():
            if index is None:
                index = torch.tensor(kv_blocks, device=layer.k.device)
            layer.k.index_fill_(0, index, 0)
            layer.v.index_fill_(0, index, 0)

    def all_kv_blocks(self) -> Iterator[LayerKVBlocks]:
        for layers in self.kv_blocks.values():
            yield from layers


def _other_calls() -> EngineError:
    return EngineError(
        "the base model's attention layers made other calls in this step than at start-up; "
        "the server cannot run this architecture"
    )
