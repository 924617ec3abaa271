"""The engine over static buffers, as a CUDA graph would replay them, without a GPU.

Greedy tokens are those of Hugging Face `generate` on the reconstructed weights, whatever is in the
padding: its cache KV block is NaN from the start.
"""

from __future__ import annotations

import pytest

from compressor.compress.options import Options
from server.errors import ConfigError
from tests.server.conftest import ALL_CODECS, N_TRUTH, PAIR, Served
from tests.server.helpers import CoreHarness
from tests.server.model.test_base import PROMPTS, assert_parity

HELD = {  # what graphs hold
    "blockdiag": PAIR["blockdiag"],
    "head": Options(codec="blockdiag", ratio=9, codec_options={"head_fraction": 0.3}),
    "other-blocks": ALL_CODECS["other-blocks"],
    "one-byte": Options(codec="blockdiag", ratio=12, codec_options={"bits": 2}),
    "impart": PAIR["impart"],
    "lowrank": Options(codec="lowrank", ratio=7, codec_options={"bits": 16}),
    "rows": ALL_CODECS["rows"],
}


def static(harness, served: Served, **settings: object) -> CoreHarness:
    made: CoreHarness = harness(served, static=True, kernels="torch", **settings)
    return made


@pytest.mark.parametrize(
    ("kind", "codecs"), [("llama", HELD), ("gpt2", PAIR), ("qwen3", PAIR), ("gemma", PAIR)]
)
def test_static_mixed_batch_equals_generate(
    served, harness, kind: str, codecs: dict[str, Options]
) -> None:
    pair = served(kind, codecs)
    engine = static(harness, pair)
    assert_parity(engine, pair)
    counts = engine.core._runner.counts
    assert counts.static > 0
    assert counts.eager == 0


def test_static_tied_embeddings_equals_generate(served, harness) -> None:
    pair = served("llama", HELD, tied=True)
    engine = static(harness, pair)
    assert_parity(engine, pair)
    assert engine.core._runner.counts.eager == 0


@pytest.mark.parametrize("max_num_seqs", [1, 5])
def test_static_batches_across_buckets_and_chunked_prefill_equal_generate(
    served, harness, max_num_seqs: int
) -> None:
    pair = served("llama", PAIR)
    assert_parity(static(harness, pair, max_num_seqs=max_num_seqs, max_batch_tokens=9), pair)


def test_static_preemption_equals_generate(served, harness) -> None:
    pair = served("llama", PAIR)
    block_bytes = harness(pair).core._runner.base.store.bytes_per_token() * 8
    small = static(harness, pair, kv_block_tokens=8, kv_cache_bytes=block_bytes * 18)
    assert_parity(small, pair)
    assert small.core.stats().n_preemptions > 0
    assert small.core.stats().n_static_steps > 0


def test_static_variants_evicted_and_reloaded_equals_generate(served, harness) -> None:
    many = served("llama", HELD)
    tight = static(harness, many, max_resident_variants=2, max_variants_per_step=2)
    assert_parity(tight, many)
    residency = tight.core._runner.base.residency
    assert residency.version > 0
    assert_parity(tight, many)
    assert not residency.eager


def test_static_reused_prefix_equals_generate(served, harness) -> None:
    pair = served("llama", PAIR)
    one = static(harness, pair, kv_block_tokens=4)
    for name in pair.checkpoints:
        first = one.submit(name, PROMPTS[1], max_tokens=N_TRUTH)
        one.run(first)
        again = one.submit(name, PROMPTS[1], max_tokens=N_TRUTH)
        one.run(again)
        assert again.request.n_cached_tokens > 0
        assert again.output_ids == first.output_ids == pair.truth(name, first.request.prompt_ids)
    one.assert_idle()


@pytest.mark.parametrize(
    ("options", "extra_vocab", "mode", "reason"),
    [
        (PAIR["blockdiag"], 0, "reconstruct", "reconstructed weights"),
        (PAIR["blockdiag"], 3, "apply", "added vocabulary"),
    ],
)
def test_what_graphs_cannot_hold_runs_eagerly_and_says_so(
    served, harness, caplog, options: Options, extra_vocab: int, mode: str, reason: str
) -> None:
    pair = served("llama", {"special": options}, extra_vocab=extra_vocab)
    engine = static(harness, pair, mode=mode)
    assert_parity(engine, pair)
    stats = engine.core.stats()
    assert stats.n_eager_decode_steps > 0
    assert reason in caplog.text
    base = engine.submit("base", PROMPTS[2], max_tokens=5)
    engine.run(base)
    assert engine.core.stats().n_static_steps > stats.n_static_steps
    assert engine.core.stats().n_eager_decode_steps == stats.n_eager_decode_steps


def test_kernels_that_need_the_rows_in_python_are_refused(served, harness) -> None:
    with pytest.raises(ConfigError, match="enforce-eager"):
        harness(served("llama", PAIR), static=True, kernels="numba")


def test_loading_a_variant_makes_earlier_graphs_stale(served, harness) -> None:
    pair = served("llama", {"blockdiag": PAIR["blockdiag"]})
    engine = static(harness, pair)
    step = engine.core._runner._static
    assert step is not None
    forgotten = []
    step.forget = lambda **_: forgotten.append(True)  # type: ignore[method-assign]
    for _ in range(2):
        request = engine.submit("blockdiag", PROMPTS[0], max_tokens=3)
        engine.run(request)
    assert forgotten == [True], "once, when its arrays were made"
