"""The engine's greedy tokens are those of Hugging Face `generate` on the reconstructed weights."""

from __future__ import annotations

import pytest

from tests.server.conftest import ALL_CODECS, N_TRUTH, PAIR, Served
from tests.server.helpers import CoreHarness, Recorded

PROMPTS = [
    "The quick brown fox",
    "book a table for four people at seven in the evening, please. Classify the request: my card",
    "x",
    "def add(left, right): return left + right and then some more words to cross a KV block",
]


def assert_parity(harness: CoreHarness, served: Served) -> None:
    """All prompts to all models, interleaved in one go, against the oracle one by one."""
    names = list(served.checkpoints)
    sent: dict[tuple[str, int], Recorded] = {}
    for i, prompt in enumerate(PROMPTS):
        for name in names:
            sent[name, i] = harness.submit(name, prompt, max_tokens=N_TRUTH)
    harness.run(*sent.values())
    harness.assert_idle()
    for name in names:
        for i in range(len(PROMPTS)):
            assert sent[name, i].error is None
            want = served.truth(name, sent[name, i].request.prompt_ids)
            assert sent[name, i].output_ids == want, (name, i)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("mode", ["apply", "reconstruct"])
def test_engine_mixed_batch_equals_generate(served, harness, kind: str, mode: str) -> None:
    pair = served(kind, PAIR)
    assert_parity(harness(pair, mode=mode), pair)


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma"])
def test_engine_other_architecture_equals_generate(served, harness, kind: str) -> None:
    pair = served(kind, PAIR)
    assert_parity(harness(pair), pair)


@pytest.mark.parametrize("mode", ["apply", "reconstruct"])
def test_engine_every_codec_in_one_batch_equals_generate(served, harness, mode: str) -> None:
    many = served("llama", ALL_CODECS)
    assert_parity(harness(many, mode=mode), many)


def test_engine_tied_embeddings_equals_generate(served, harness) -> None:
    pair = served("llama", PAIR, tied=True)
    assert_parity(harness(pair), pair)


def test_engine_added_vocabulary_equals_generate(served, harness) -> None:
    pair = served("llama", PAIR, extra_vocab=3)
    assert_parity(harness(pair), pair)


def test_engine_sliding_window_equals_generate(served, harness) -> None:
    pair = served("mistral", PAIR, sliding_window=8)
    assert_parity(harness(pair), pair)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_engine_chunked_prefill_equals_generate(served, harness, kind: str) -> None:
    pair = served(kind, PAIR)
    assert_parity(harness(pair, max_batch_tokens=7, max_num_seqs=5), pair)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_engine_preemption_equals_generate(served, harness, kind: str) -> None:
    pair = served(kind, PAIR)
    block_bytes = harness(pair).core._runner.base.store.bytes_per_token() * 8
    small = harness(pair, kv_block_tokens=8, kv_cache_bytes=block_bytes * 18)
    assert_parity(small, pair)
    assert small.core.stats().n_preemptions > 0


@pytest.mark.parametrize("name", ["base", "blockdiag", "impart"])
def test_engine_alone_equals_mixed(served, harness, name: str) -> None:
    pair = served("llama", PAIR)
    alone = harness(pair)
    request = alone.submit(name, PROMPTS[1], max_tokens=N_TRUTH)
    alone.run(request)
    assert request.output_ids == pair.truth(name, request.request.prompt_ids)


def test_engine_whole_batch_reconstructed_equals_generate(served, harness) -> None:
    """No row needs the base's products."""
    pair = served("llama", PAIR)
    engine = harness(pair, mode="reconstruct")
    requests = [engine.submit(name, PROMPTS[1], max_tokens=N_TRUTH) for name in PAIR]
    engine.run(*requests)
    for name, request in zip(PAIR, requests, strict=True):
        assert request.output_ids == pair.truth(name, request.request.prompt_ids)


def test_engine_variants_evicted_and_reloaded_equals_generate(served, harness) -> None:
    many = served("llama", ALL_CODECS)
    tight = harness(many, max_resident_variants=2, max_variants_per_step=2)
    assert_parity(tight, many)
    assert_parity(tight, many)


def test_engine_variants_differ_from_base_and_each_other(served) -> None:
    pair = served("llama", PAIR)
    outputs = [pair.truth(name, [5, 6, 7, 8, 9]) for name in pair.checkpoints]
    assert len({tuple(o) for o in outputs}) == len(outputs)


def test_engine_prefix_of_another_salt_is_not_reused(served, harness) -> None:
    pair = served("llama", PAIR)
    one = harness(pair, kv_block_tokens=4)
    found = []
    for salt in ("ours", "theirs", "ours", "", "theirs"):
        request = one.submit("blockdiag", PROMPTS[1], max_tokens=2, cache_salt=salt)
        one.run(request)
        found.append(request.request.n_cached_tokens > 0)
    assert found == [False, False, True, False, True]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_engine_reused_prefix_equals_generate(served, harness, kind: str) -> None:
    pair = served(kind, PAIR)
    one = harness(pair, kv_block_tokens=4)
    prompt = PROMPTS[1]
    for name in pair.checkpoints:
        first = one.submit(name, prompt, max_tokens=N_TRUTH)
        one.run(first)
        again = one.submit(name, prompt, max_tokens=N_TRUTH)
        longer = one.submit(name, [*first.request.tokens[:-1], 7], max_tokens=4)
        one.run(again, longer)
        assert first.request.n_cached_tokens == 0, "another variant's KV blocks must not be found"
        assert again.request.n_cached_tokens >= len(first.request.prompt_ids) - 4
        assert longer.request.n_cached_tokens > len(first.request.prompt_ids)
        want = pair.truth(name, first.request.prompt_ids)
        assert first.output_ids == again.output_ids == want
        assert longer.output_ids == pair.truth(name, longer.request.prompt_ids)[:4]
    one.assert_idle()
