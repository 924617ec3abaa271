"""Sampling against independent oracles: Hugging Face's logits, literal loops, counted draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.engine.request import Request
from server.engine.step.sampler import Sampler
from server.engine.types import OutputChunk, SamplingParams, TokenLogprob
from server.engine.variant import Variant
from server.text.assets import TextAssets
from tests.server.conftest import PAIR, Served
from tests.server.helpers import CoreHarness, Recorded
from tests.tiny import make_tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog"
NAMES = ["base", "blockdiag", "impart"]
Make = Callable[..., CoreHarness]


@pytest.fixture
def pair(served: Callable[..., Served]) -> Served:
    return served("llama", PAIR)


def hf_logits(served: Served, name: str, ids: list[int]) -> Tensor:
    """[len(ids), V]; row i predicts token i + 1."""
    with torch.inference_mode():
        return served.oracle(name)(torch.tensor([ids])).logits[0]


def outputs(one: Recorded) -> list[OutputChunk]:
    return one.chunks


def assert_logprobs(found: list[TokenLogprob], ids: list[int], rows: Tensor, k: int) -> None:
    """Each entry against the row of logits that predicts it."""
    assert [one.token_id for one in found] == ids
    for one, row in zip(found, torch.log_softmax(rows.double(), -1), strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=2e-4)
        best = torch.topk(row, k)
        assert [t.token_id for t in one.top] == best.indices.tolist()
        assert [t.logprob for t in one.top] == pytest.approx(best.values.tolist(), abs=2e-4)


# -- log probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [512, 7])
def test_logprobs_of_output_and_prompt_equal_log_softmax_of_the_oracle(
    pair: Served, harness: Make, chunk: int
) -> None:
    engine = harness(pair, max_batch_tokens=chunk)
    sent = [
        engine.submit(name, PROMPT, max_tokens=6, logprobs=3, prompt_logprobs=True, ignore_eos=True)
        for name in NAMES
    ]
    engine.run(*sent)
    for name, one in zip(NAMES, sent, strict=True):
        prompt, events = one.request.prompt_ids, outputs(one)
        rows = hf_logits(pair, name, prompt + one.output_ids)
        first = events[0].prompt_logprobs[0]
        assert (first.token_id, first.logprob, first.top) == (prompt[0], None, ())
        assert_logprobs(list(events[0].prompt_logprobs[1:]), prompt[1:], rows[: len(prompt) - 1], 3)
        assert not any(e.prompt_logprobs for e in events[1:])
        own = [p for e in events for p in e.logprobs]
        assert_logprobs(own, one.output_ids, rows[len(prompt) - 1 : -1], 3)


def test_logprobs_are_those_before_penalties_and_temperature(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    one = engine.submit(
        "blockdiag", PROMPT, logprobs=2, temperature=1.5, seed=3, repetition_penalty=1.4
    )
    engine.run(one)
    rows = hf_logits(pair, "blockdiag", one.request.prompt_ids + one.output_ids)
    own = [p for e in outputs(one) for p in e.logprobs]
    assert_logprobs(own, one.output_ids, rows[len(one.request.prompt_ids) - 1 : -1], 2)


def test_max_tokens_zero_scores_the_prompt_only(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    one = engine.submit("impart", PROMPT, max_tokens=0, logprobs=1, prompt_logprobs=True)
    engine.run(one)
    (event,) = outputs(one)
    prompt = one.request.prompt_ids
    assert (event.text, event.token_ids, event.finish_reason) == ("", (), "length")
    rows = hf_logits(pair, "impart", prompt)
    assert_logprobs(list(event.prompt_logprobs[1:]), prompt[1:], rows[:-1], 1)
    engine.assert_idle()


def test_prompt_logprobs_beside_a_variant_with_more_vocabulary(
    served: Callable[..., Served], harness: Make
) -> None:
    pair = served("llama", PAIR, extra_vocab=3)
    engine = harness(pair)
    warm = engine.submit("impart", "x", max_tokens=1)
    engine.run(warm)
    sent = [
        engine.submit(name, PROMPT, max_tokens=2, logprobs=2, prompt_logprobs=True, ignore_eos=True)
        for name in ("base", "impart")
    ]
    engine.run(*sent)
    one = sent[0]
    assert one.error is None
    prompt = one.request.prompt_ids
    rows = hf_logits(pair, "base", prompt)[:-1]
    assert_logprobs(list(outputs(one)[0].prompt_logprobs[1:]), prompt[1:], rows, 2)


# -- penalties and biases ----------------------------------------------------------------------


def test_repetition_penalty_greedy_equals_generate(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    sent = [engine.submit(n, PROMPT, repetition_penalty=1.3, ignore_eos=True) for n in NAMES]
    engine.run(*sent)
    for name, one in zip(NAMES, sent, strict=True):
        ids = torch.tensor([one.request.prompt_ids])
        want = pair.oracle(name).generate(
            ids, do_sample=False, max_new_tokens=16, repetition_penalty=1.3, eos_token_id=None
        )
        assert one.output_ids == want[0, ids.shape[1] :].tolist()


def test_presence_frequency_and_bias_equal_a_literal_loop(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    plain = pair.truth("blockdiag", engine.encode(engine.catalog.open("base"), PROMPT))
    bias = ((plain[0], -3.0), (plain[1], 1.5), (7, 2.0))
    one = engine.submit(
        "blockdiag",
        PROMPT,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias=bias,
        ignore_eos=True,
    )
    engine.run(one)
    ids, want = list(one.request.prompt_ids), []
    for _ in range(16):
        logits = hf_logits(pair, "blockdiag", ids)[-1].tolist()
        for token, count in Counter(want).items():  # generated tokens only, as OpenAI says
            logits[token] -= 0.7 + 0.4 * count
        for token, value in bias:
            logits[token] += value
        want.append(max(range(len(logits)), key=logits.__getitem__))
        ids.append(want[-1])
    assert one.output_ids == want
    assert want != plain[:16]


# -- where it ends -----------------------------------------------------------------------------


def test_stop_token_ends_the_text_and_is_not_shown(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    plain = engine.submit("base", PROMPT)
    engine.run(plain)
    stop = plain.output_ids[4]
    at = plain.output_ids.index(stop)
    one = engine.submit("base", PROMPT, stop_token_ids=(stop,))
    engine.run(one)
    last = outputs(one)[-1]
    assert one.output_ids == plain.output_ids[: at + 1]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert one.text == engine.catalog.open("base").text.decode(plain.output_ids[:at])


def test_min_tokens_equals_generate_with_min_new_tokens(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    plain = engine.submit("impart", PROMPT)
    engine.run(plain)
    stop = plain.output_ids[2]
    one = engine.submit("impart", PROMPT, min_tokens=8, stop_token_ids=(stop,), ignore_eos=True)
    engine.run(one)
    ids = torch.tensor([one.request.prompt_ids])
    want = pair.oracle("impart").generate(
        ids, do_sample=False, max_new_tokens=16, min_new_tokens=8, eos_token_id=stop, pad_token_id=0
    )
    assert one.output_ids == want[0, ids.shape[1] :].tolist()
    assert stop not in one.output_ids[:8]


@pytest.mark.parametrize("ignore", [False, True])
def test_eos_ends_the_text_unless_ignored(pair: Served, harness: Make, ignore: bool) -> None:
    engine = harness(pair)
    plain = engine.submit("base", PROMPT)
    engine.run(plain)
    eos = plain.output_ids[3]
    variant = engine.catalog.open("base")
    text = replace(variant.text, eos_token_ids=frozenset({eos}))
    engine.catalog._base = replace(variant, text=text)
    one = engine.submit("base", PROMPT, ignore_eos=ignore)
    engine.run(one)
    at = plain.output_ids.index(eos)
    assert one.output_ids == (plain.output_ids if ignore else plain.output_ids[: at + 1])
    last = outputs(one)[-1]
    assert (last.finish_reason, last.stop_reason) == ("length" if ignore else "stop", None)


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_a_token_boundary(pair: Served, harness: Make, include: bool) -> None:
    engine = harness(pair)
    plain = engine.submit("blockdiag", PROMPT)
    engine.run(plain)
    decode = engine.catalog.open("blockdiag").text.decode
    border = len(decode(plain.output_ids[:6]))
    stop = plain.text[border - 1 : border + 1]
    one = engine.submit("blockdiag", PROMPT, stop=(stop,), include_stop_str_in_output=include)
    engine.run(one)
    assert one.text == plain.text.partition(stop)[0] + (stop if include else "")
    last = outputs(one)[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert len(one.output_ids) < len(plain.output_ids)
    engine.assert_idle()


# -- random draws ------------------------------------------------------------------------------


def test_seeded_text_is_the_same_alone_and_in_any_batch(
    served: Callable[..., Served], harness: Make
) -> None:
    """The others have more vocabulary, so that the batch's logits are wider."""
    pair = served("llama", PAIR, extra_vocab=3)
    params = {"temperature": 1.0, "top_p": 0.95, "ignore_eos": True}
    alone = harness(pair)
    first = [alone.submit("base", PROMPT, seed=5, **params)]
    alone.run(*first)
    first.append(alone.submit("impart", PROMPT, seed=5, **params))
    alone.run(*first)
    mixed = harness(pair, max_batch_tokens=16)
    others = [mixed.submit(name, "x", temperature=0.7) for name in NAMES * 2]
    mixed.core.turn()
    second = [mixed.submit(name, PROMPT, seed=5, **params) for name in ("base", "impart")]
    different = mixed.submit("base", PROMPT, seed=6, **params)
    mixed.run(*second, *others, different)
    assert [r.output_ids for r in second] == [r.output_ids for r in first]
    assert different.output_ids != second[0].output_ids


def sampled_text(engine: CoreHarness, **params: object) -> list[int]:
    fields = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "ignore_eos": True}
    one = engine.submit("impart", PROMPT, **(fields | params))  # type: ignore[arg-type]
    engine.run(one)
    return one.output_ids


def test_seeded_text_is_the_same_with_a_cached_prefix(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    first = sampled_text(engine)
    assert engine.core.stats().n_prefix_hit == 0
    assert sampled_text(engine) == first
    assert engine.core.stats().n_prefix_hit > 0


def test_seeded_text_is_the_same_when_preempted(pair: Served, harness: Make) -> None:
    want = sampled_text(harness(pair), max_tokens=40)
    engine = harness(pair, kv_cache_bytes=1 << 17)
    params = {"temperature": 1.0, "top_p": 0.95, "ignore_eos": True, "max_tokens": 40}
    sent = [engine.submit("impart", PROMPT, seed=5 + i // 3, **params) for i in range(4)]
    engine.run(*sent)
    assert engine.core.stats().n_preemptions > 0
    assert [one.output_ids for one in sent[:3]] == [want] * 3
    assert sent[3].output_ids != want


def test_seed_continues_where_a_text_was_cut(pair: Served, harness: Make) -> None:
    """The noise belongs to the position: prompt and output sent again go on as one request."""
    engine = harness(pair)
    whole = sampled_text(engine)
    prompt = engine.encode(engine.catalog.open("impart"), PROMPT)
    params = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "ignore_eos": True}
    rest = engine.submit("impart", prompt + whole[:7], max_tokens=9, **params)
    engine.run(rest)
    assert rest.output_ids == whole[7:]


def test_text_without_a_seed_differs_every_time(pair: Served, harness: Make) -> None:
    engine = harness(pair)
    texts = {tuple(sampled_text(engine, seed=None)) for _ in range(4)}
    assert len(texts) == 4


N_DRAWS = 3000
LOGITS = [2.0, 1.6, 1.5, 1.0, 0.4, 0.1, -0.3, -1.0, -1.2, -3.0]


def literal_probs(temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The filters in Hugging Face's order, one token at a time."""

    def normalised(weights: dict[int, float]) -> dict[int, float]:
        total = math.fsum(weights.values())
        return {i: w / total for i, w in weights.items()}

    left = normalised({i: math.exp(x / temperature) for i, x in enumerate(LOGITS)})
    if top_k:
        best = sorted(left, key=left.__getitem__, reverse=True)[:top_k]
        left = normalised({i: left[i] for i in best})
    kept, mass = {}, 0.0
    for i in sorted(left, key=left.__getitem__, reverse=True):
        if mass >= top_p:
            break
        kept[i] = left[i]
        mass += left[i]
    left = normalised(kept)
    left = normalised({i: p for i, p in left.items() if p >= min_p * max(left.values())})
    return [left.get(i, 0.0) for i in range(len(LOGITS))]


@pytest.mark.parametrize(
    "setting",
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.3, 4, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.8, 6, 0.9, 0.1),
    ],
)
def test_draws_have_the_distribution_of_the_filters(setting: tuple[float, int, float, float]):
    temperature, top_k, top_p, min_p = setting
    text = TextAssets.of_tokenizer(make_tokenizer(320))
    variant = Variant("v", "v", None, "", len(LOGITS), text)
    requests = [
        Request(
            request_id=str(i),
            variant=variant,
            prompt_ids=[0],
            params=SamplingParams(
                1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=i
            ),
            deliver=lambda event: None,
        )
        for i in range(N_DRAWS)
    ]
    logits = torch.tensor([LOGITS]).repeat(N_DRAWS, 1)
    drawn = Counter(one.token_id for one in Sampler().sample(requests, logits))
    probs = literal_probs(*setting)
    assert all(probs[token] > 0 for token in drawn)
    expected = [(drawn[i], N_DRAWS * p) for i, p in enumerate(probs) if p > 0]
    chi_square = sum((seen - want) ** 2 / want for seen, want in expected)
    assert chi_square < 33.7  # 99.99 % quantile of 9 degrees of freedom, the most there are
