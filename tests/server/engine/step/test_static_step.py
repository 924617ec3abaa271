"""Static buffers with stale and poisoned contents: a step depends on its own rows only.

The forward pass is made of the operations in torch, so it runs at torch's speed; the kernels
themselves go through the same buffers in `tests/benchmarks/gpu/test_decoder.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")  # the reference of decoding lives beside its kernel

from server.engine.step.runner import Runner
from server.engine.step.static_buffers import DecodeRow, StaticBatch, StaticBuffers, segments_of
from server.engine.step.static_step import BUCKETS, StaticStep
from server.errors import ConfigError
from server.ops.blockdiag import TorchBlockDiag
from server.ops.norm import RmsForm, rms_norm
from server.ops.row_mapping import Segment, SlotSegments
from server.ops.triton.attention import paged_decode_reference
from server.ops.triton.segments import DECODE_ROWS
from tests.server.model.test_own_attention import prepared
from tests.server.ops.triton.helpers import CPU, generator, pack, random_term
from tests.simulated_cuda import simulated_cuda

BLOCK_TOKENS, DIM, VOCAB = 4, 8, 20
SLOTS = (0, 2)  # slot 1 holds garbage and NaN


class Toy:
    """Embedding, a norm per variant, cached attention, one linear with deltas."""

    def __init__(self) -> None:
        self.embedding = torch.randn(VOCAB, DIM, generator=generator(0))
        self.weight = torch.randn(VOCAB, DIM, generator=generator(1))
        self.norms = torch.rand(4, DIM, generator=generator(2))
        self.norms[2] = float("nan")  # slot 1's
        terms = {slot: [random_term((VOCAB, DIM), 2, 4, slot)] for slot in SLOTS}
        blocks, place_of = pack(terms, 3)
        self.deltas = TorchBlockDiag(replace(blocks, place_of=place_of))
        self.cache = torch.full((6, BLOCK_TOKENS, 1, DIM), float("nan"))
        self.batches: dict[int, StaticBatch] = {}  # the last one of each bucket

    def __call__(self, batch: StaticBatch, with_deltas: bool) -> Tensor:
        self.batches[len(batch.lengths)] = batch
        h = F.embedding(batch.input_ids[0], self.embedding)
        h = h + batch.position_ids[0].unsqueeze(1).cos()
        kept = batch.cache_rows >= 0
        self.cache.view(-1, 1, DIM)[batch.cache_rows[kept]] = h[kept].unsqueeze(1)
        q = h.unsqueeze(1)
        h = paged_decode_reference(
            q, self.cache, self.cache, batch.kv_blocks, batch.lengths, scale=1.0
        ).flatten(1)
        x = rms_norm(h, self.norms, batch.vector_rows, RmsForm(1e-5, 0.0, casts_first=True))
        y = x @ self.weight.T
        if with_deltas:
            table, count = batch.table, batch.segments.count
            self.deltas.add_([y], x, SlotSegments(table, len(table), DECODE_ROWS, count))
        return y


def row(token: int, at: int, kv_block: int, slot: int) -> DecodeRow:
    return DecodeRow(token, at, kv_block * BLOCK_TOKENS + at, [kv_block], at + 1, slot)


def new_step(max_rows: int, toy: Toy | None = None) -> StaticStep:
    return StaticStep(toy or Toy(), max_rows=max_rows, max_kv_blocks=3, device=CPU)


def fields_of(batch: StaticBatch) -> list[Tensor]:
    """Every array that a step is filled into."""
    segments = batch.segments
    return [
        batch.input_ids,
        batch.position_ids,
        batch.cache_rows,
        batch.vector_rows,
        batch.kv_blocks,
        batch.lengths,
        segments.slots,
        segments.starts,
        segments.ends,
        segments.count,
    ]


def test_padding_stale_rows_and_garbage_change_nothing() -> None:
    rows = [row(5, 0, 0, -1), row(5, 0, 1, 0), row(5, 0, 2, 2)]
    want = [new_step(1).run([one])[0].clone() for one in rows]  # no padding, fresh buffers
    toy = Toy()
    step = new_step(8, toy)
    many = [row(i, 0, i % 6, slot) for i, slot in enumerate((-1, -1, 0, 0, 2, 2, 2, 2))]
    for bucket in step.buckets:
        step.run(many[:bucket])
    assert tuple(toy.batches) == step.buckets
    for batch in toy.batches.values():
        for array in fields_of(batch):
            array.fill_(10**9)
    for i, one in enumerate(rows):
        torch.testing.assert_close(step.run([one])[0], want[i])
    together = step.run(rows)
    for i in range(3):
        torch.testing.assert_close(together[i], want[i])
    assert not torch.allclose(want[0], want[1])
    assert bool(torch.isfinite(together).all())


def test_rows_of_a_sequence_see_its_earlier_tokens() -> None:
    step = new_step(2)
    first = step.run([row(3, 0, 4, 0)])[0].clone()
    second = step.run([row(3, 1, 4, 0)])[0].clone()
    other = step.run([row(9, 0, 5, 0), row(3, 1, 4, 0)])
    torch.testing.assert_close(other[1], second)
    assert not torch.allclose(first, second)


def test_a_step_copies_as_many_kv_blocks_as_its_longest_sequence_has() -> None:
    buffers = StaticBuffers(4, 1000, CPU, -1)
    long = DecodeRow(1, 899 * BLOCK_TOKENS, 0, list(range(900)), 899 * BLOCK_TOKENS + 1)
    few = buffers.fill([row(1, 0, 7, -1)])
    assert few < 300
    assert buffers.fill([long]) > few + 4 * 4 * 890
    assert buffers.batch.kv_blocks[0, :900].tolist() == list(range(900))
    shorter = buffers.fill([row(1, 0, 7, -1), row(1, 0, 9, -1)])
    assert shorter > 4 * 4 * 890, "once more, to clear what the long one left"
    assert buffers.fill([row(1, 0, 7, -1)]) == few
    assert int(buffers.batch.kv_blocks.sum()) == 7


def test_kv_block_tables_hold_what_their_rows_hold_whoever_was_there_before() -> None:
    """Rows come, go, change places and grow; every table is compared with one written at once."""
    chosen = random.Random(0)
    buffers = StaticBuffers(8, 40, CPU, -1)
    alive = [[kv_block] for kv_block in range(1, 6)]
    for turn in range(200):
        for kv_blocks in alive:
            if len(kv_blocks) < 40 and chosen.random() < 0.7:
                kv_blocks.append(chosen.randrange(1, 1000))
        if chosen.random() < 0.4:
            alive.pop(chosen.randrange(len(alive)))
            alive += [[chosen.randrange(1, 1000)] for _ in range(chosen.randrange(8 - len(alive)))]
        if not alive or turn % 7 == 0:
            alive.append([turn + 1])
        alive = alive[:8]
        chosen.shuffle(alive)
        buffers.fill([DecodeRow(0, 0, 0, kv_blocks, 1) for kv_blocks in alive])
        want = torch.zeros(8, 40, dtype=torch.int32)
        for i, kv_blocks in enumerate(alive):
            want[i, : len(kv_blocks)] = torch.tensor(kv_blocks)
        assert torch.equal(buffers.batch.kv_blocks, want), turn


@pytest.mark.parametrize("rows", BUCKETS)
def test_every_field_begins_at_16_bytes_in_every_bucket(rows: int) -> None:
    """Or Triton compiles its kernels once more for this bucket, while streams wait."""
    batch = StaticBuffers(rows, 3, CPU, -1).batch
    parts = batch.segments
    fields = [
        batch.input_ids,
        batch.position_ids,
        batch.cache_rows,
        batch.vector_rows,
        batch.kv_blocks,
    ]
    fields += [batch.lengths, batch.rows, parts.slots, parts.starts, parts.ends, parts.count]
    assert [field.data_ptr() % 16 for field in fields] == [0] * len(fields)
    assert torch.equal(batch.table, torch.stack([parts.slots, parts.starts, parts.ends], 1))


class Adder:
    """Logits are tokens plus what lies in two device arrays, one of them read with deltas only."""

    def __init__(self) -> None:
        self.base = torch.tensor([100.0], device="cuda")
        self.deltas = torch.tensor([1000.0], device="cuda")
        self.n_calls = 0
        self.fails = False

    def __call__(self, batch: StaticBatch, with_deltas: bool) -> Tensor:
        self.n_calls += 1
        if self.fails and torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no room for a graph")
        out = batch.input_ids[0].unsqueeze(1) + self.base
        return out + self.deltas if with_deltas else out


@pytest.fixture
def adder() -> Iterator[Adder]:
    with simulated_cuda():
        yield Adder()


def on_gpu(adder: Adder) -> StaticStep:
    return StaticStep(adder, max_rows=4, max_kv_blocks=3, device=torch.device("cuda"))


def test_graphs_are_captured_once_and_replayed(adder: Adder) -> None:
    step = on_gpu(adder)
    assert step.run([row(1, 0, 0, -1), row(2, 0, 1, -1)]).flatten().tolist() == [101, 102]
    assert adder.n_calls == 2, "one to compile, one to capture"
    assert step.run([row(7, 0, 0, -1), row(8, 0, 1, -1)]).flatten().tolist() == [107, 108]
    assert adder.n_calls == 2
    assert step.run([row(7, 0, 0, -1), row(8, 0, 1, 3)]).flatten().tolist() == [1107, 1108]


def test_moved_delta_arrays_leave_the_graphs_of_the_base(adder: Adder) -> None:
    step = on_gpu(adder)
    base, mixed = [row(1, 0, 0, -1)], [row(1, 0, 0, 0)]
    assert (step.run(base).item(), step.run(mixed).item()) == (101, 1101)
    adder.deltas = torch.tensor([2000.0], device="cuda")
    assert step.run(mixed).item() == 1101, "a graph reads what it was captured with"
    step.forget(with_deltas_only=True, new_kernels=False)
    n_calls = adder.n_calls
    assert (step.run(base).item(), step.run(mixed).item()) == (101, 2101)
    assert adder.n_calls == n_calls + 1, "captured again without a warm-up; the base's is kept"
    adder.base = torch.tensor([200.0], device="cuda")
    step.forget()
    assert (step.run(base).item(), step.run(mixed).item()) == (201, 2201)


def test_a_graph_that_cannot_be_captured_runs_eagerly_and_is_tried_again(
    adder: Adder, caplog: pytest.LogCaptureFixture
) -> None:
    step, stream = on_gpu(adder), torch.cuda.current_stream()
    adder.fails = True
    for token in (1, 2):
        assert step.run([row(token, 0, 0, -1)]).item() == 100 + token
    assert step.runs_eagerly(1, False)
    assert caplog.text.count("such steps run eagerly") == 1
    assert torch.cuda.current_stream() is stream
    adder.fails = False
    step.forget(with_deltas_only=True)
    assert step.run([row(3, 0, 0, -1)]).item() == 103
    assert not step.runs_eagerly(1, False)


def test_addresses_never_change() -> None:
    toy = Toy()
    step, seen = new_step(4, toy), []
    for n_rows in (4, 3):
        step.run([row(1, 0, 0, -1)] * n_rows)
        seen.append([array.data_ptr() for array in fields_of(toy.batches[4])])
    assert seen[0] == seen[1]


def test_segments_are_runs_of_one_slot() -> None:
    rows = [row(0, 0, 0, slot) for slot in (-1, -1, 0, 2, 2)]
    assert segments_of(rows) == [Segment(-1, 0, 2), Segment(0, 2, 3), Segment(2, 3, 5)]


def test_too_many_rows_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="max-num-seqs"):
        new_step(1000)


def test_definition_that_multiplies_queries_and_keys_itself_runs_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = Runner(prepared("bloom"))
    runner.use_static(max_rows=2, max_len=32)
    assert runner._static is None
    assert "without CUDA graphs, slower: the base's definition multiplies" in caplog.text
