"""The engine against the definition, on the base that is to be served, before anything is served.

Two sequences of random tokens go through the engine's own steps: packed in one batch, prompts in
two chunks, then token by token; first of the base alone, then one of them of a slot that has a
delta of every parameter. Decoder layers and logits must be what transformers' eager attention
computes for the same tokens and weights. So whatever a definition does that a packed batch breaks -
state, an axis taken for the tokens', positions counted otherwise, a module that nobody knew of - is
found by what it does, and the layer is named. Long windows and chunks are not reached: those are
read from the masks (`server.model.mask`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from server.engine.check.compare import (
    OUTLIERS,
    Bounds,
    Parting,
    first_parting,
    floor_of,
    is_exact_enough,
    measured_bounds,
    worst,
)
from server.engine.check.steps import (
    N_DECODED,
    CheckedSequence,
    Rows,
    kv_blocks_for,
    rows_by_sequence,
    run_steps,
)
from server.engine.check.synthetic import resident, synthetic_deltas
from server.engine.step.runner import Runner
from server.model.base import BaseModel, weight_bytes
from server.model.definition import Definition, Deltas, Watch
from server.model.refusal import not_served, refused
from server.ops.alone import alone_if_small

log = logging.getLogger(__name__)
N_TOKENS = 18  # of the longer sequence, at least
N_SHORTER = 8
REACHED = 64  # a window or chunk of so many tokens at most is longer than no sequence
SLOT = 1  # any but the first


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the definition computes for two sequences of the base: others than the kernels that were
    checked are held to it.
    """

    longer: list[int]
    shorter: list[int]
    rows: list[Rows]
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class Checked:
    """What agreed: the largest relative difference, and what would have been too much."""

    error: float
    allowed: float  # at the place where it is most
    wanted: Wanted

    def __str__(self) -> str:
        return f"to {self.error:.1g} of a row's size; {self.allowed:.2g} is allowed"


def check_engine(base: BaseModel, block_tokens: int, deltas: Deltas | None = None) -> Checked:
    """Compare. The KV store must be empty, and is again afterwards.

    deltas  of a variant, instead of made-up ones

    Raises ConfigError naming the first place where both part.
    """
    started = time.monotonic()
    assert base.definition is not None, "see `prepare_base_model`"
    n_bytes = weight_bytes(base.parameters.values())
    # Not inference mode: later loads write into arrays of the pools that are made here.
    with refused(base.model, "the self-check"), torch.no_grad(), alone_if_small(n_bytes):
        checked = _checked(base, base.definition, block_tokens, deltas)
    log.info(
        "the engine computes what the model's own definition does (%s); the check took %.2f s",
        checked,
        time.monotonic() - started,
    )
    return checked


def _checked(
    base: BaseModel, definition: Definition, block_tokens: int, deltas: Deltas | None
) -> Checked:
    longer, shorter = _sequences(base)
    runner = Runner(base)
    known = [p for p in base.parameters.values() if p in definition.parameters]
    made = synthetic_deltas(known) if deltas is None else deltas
    plain = _by_definition(definition, [longer, shorter], {})
    own = _by_definition(definition, [longer], made)
    bounds = Bounds(floor_of(base.dtype, base.device))
    if not is_exact_enough(base.dtype):
        outliers = OUTLIERS if definition.has_experts else 0.0
        noisy = _by_definition(definition, [longer], made, torch.finfo(base.dtype).eps)
        bounds = measured_bounds(bounds.floor, noisy, own, outliers)
    alone = [CheckedSequence(longer, all_logits=True), CheckedSequence(shorter)]
    with _kv_blocks(base, block_tokens, kv_blocks_for(alone, block_tokens)):
        found = run_steps(runner, alone)
        _agree(base, "the base alone", found, plain, bounds)
        with resident(made, SLOT):
            mixed = run_steps(runner, [CheckedSequence(shorter), CheckedSequence(longer, SLOT)])
    wanted = [plain[1], own[0]]
    _agree(base, "base and variant in one batch", mixed, wanted, bounds)
    pairs = zip([*found, *mixed], [*plain, *wanted], strict=True)
    error = max(worst(ours, theirs, bounds) for ours, theirs in pairs)
    return Checked(error, bounds.largest, Wanted(longer, shorter, plain, bounds))


def _agree(
    base: BaseModel, what: str, ours: Sequence[Rows], wanted: Sequence[Rows], bounds: Bounds
) -> None:
    partings = (first_parting(a, b, bounds) for a, b in zip(ours, wanted, strict=True))
    for parting in partings:
        if parting is not None:
            raise not_served(base.model, _sentence(what, parting))


def _sentence(what: str, parting: Parting) -> str:
    return f"the self-check found that with {what} {parting}, so the text would be wrong"


def _sequences(base: BaseModel) -> tuple[list[int], list[int]]:
    """Of different lengths; the longer is longer than every window and chunk within reach."""
    masks = [layer.mask for layers in base.store.layers.values() for layer in layers]
    sizes = [size for mask in masks for size in (mask.window, mask.chunk) if size is not None]
    reached = max([size for size in sizes if size <= REACHED], default=0)
    n = min(max(N_TOKENS, reached + reached // 2 + N_DECODED), base.max_len)
    special = _special_ids(base)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, base.vocab_size, (8 * (n + N_SHORTER),), generator=generator)
    usable = [int(i) for i in drawn if int(i) not in special]
    n_shorter = max(n - N_SHORTER, N_DECODED + 2)
    return usable[:n], usable[n : n + n_shorter]


def _special_ids(base: BaseModel) -> set[int]:
    """Ids that some definitions treat otherwise: padding, images."""
    configs = (base.model.config, base.model.config.get_text_config())
    fields = {name: value for config in configs for name, value in vars(config).items()}
    ids = (value for name, value in fields.items() if "token_id" in name or "token_index" in name)
    return {value for value in ids if isinstance(value, int)}


def _by_definition(
    definition: Definition, sequences: Sequence[list[int]], deltas: Deltas, noise: float = 0.0
) -> list[Rows]:
    """All in one pass, the shorter filled up behind: nothing later changes what comes before."""
    n = max(map(len, sequences))
    device = next(definition.model.parameters()).device
    ids = torch.tensor([[*s, *s[:1] * (n - len(s))] for s in sequences], device=device)
    watch = Watch(definition.model)
    logits = definition.run(ids, deltas, watch, noise)
    places = {path: rows_by_sequence(calls, len(ids), n) for path, calls in watch.outputs.items()}
    return [
        Rows(
            {path: rows[i, : len(s)] for path, rows in places.items() if rows is not None},
            dict(enumerate(logits[i, : len(s)])),
        )
        for i, s in enumerate(sequences)
    ]


@contextmanager
def _kv_blocks(base: BaseModel, block_tokens: int, n_kv_blocks: int) -> Iterator[None]:
    """KV blocks of the check's own."""
    base.store.allocate(n_kv_blocks, block_tokens, base.device)
    try:
        yield
    finally:
        base.store.release()
