"""The engine as on a GPU, graphs, streams and Triton's kernels included, on a simulated one.

Greedy tokens are those of Hugging Face `generate` on the reconstructed weights, and nothing
happens that CUDA refuses (see `tests.simulated_cuda`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from server.engine.observer import CoreStats
from server.engine.types import SamplingParams
from server.ops.selfcheck import check_kernels
from server.ops.triton.kernels import TritonKernels
from tests.server.conftest import Served
from tests.server.engine.step.test_static_step_parity import HELD
from tests.server.engine.test_llm_engine import running, stream
from tests.simulated_cuda import Device, simulated_cuda

PROMPT = [5, 6, 7]
SMALL = {"num_hidden_layers": 1, "tied": True}
Answers = dict[str, list[int]]


@contextlib.contextmanager
def on_gpu() -> Iterator[Device]:
    """Without the start-up check, which has its own test."""
    with (
        simulated_cuda() as device,
        mock.patch("server.ops.selfcheck.check_kernels"),
    ):
        yield device


def ask_all(
    pair: Served,
    params: SamplingParams,
    prompt: list[int] = PROMPT,
    *,
    together: bool = True,
    **settings: Any,
) -> tuple[Answers, CoreStats]:
    """Every model's tokens from one engine, and what it counted."""

    async def main() -> tuple[Answers, CoreStats]:
        chosen = {"device": "cuda", "max_num_seqs": 4, "max_model_len": 256} | settings
        async with running(pair, **chosen) as engine:

            async def ask(name: str) -> list[int]:
                variant = await engine.open(name)
                chunks = stream(engine, variant, prompt, params)
                return [token async for chunk in chunks for token in chunk.token_ids]

            names = list(pair.checkpoints)
            if together:
                found = await asyncio.gather(*map(ask, names))
            else:
                found = [await ask(name) for name in names]
            return dict(zip(names, found, strict=True)), engine.core.stats()

    return asyncio.run(main())


def greedy(n_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=n_tokens, temperature=0.0)


def assert_truth(pair: Served, answers: Answers, prompt: list[int], n_tokens: int) -> None:
    assert answers == {name: pair.truth(name, prompt)[:n_tokens] for name in pair.checkpoints}


def made(
    served: Callable[..., Served], kind: str, *names: str, prompt: list[int] = PROMPT, **more: Any
) -> Served:
    """With the truths known: torch makes them on the CPU, outside the simulation."""
    pair: Served = served(kind, {name: HELD[name] for name in names}, **(SMALL | more))
    for name in pair.checkpoints:
        pair.truth(name, prompt)
    return pair


def test_engine_on_a_gpu_equals_generate(served) -> None:
    pair = made(served, "llama", "blockdiag")
    with on_gpu() as gpu:
        answers, stats = ask_all(pair, greedy(3), max_num_seqs=2)
    assert_truth(pair, answers, PROMPT, 3)
    assert stats.n_static_steps > 0
    assert stats.n_eager_decode_steps == 0
    assert gpu.n_launches > 0


@pytest.mark.slow  # every launch is interpreted: half a minute to a minute each, as those below
@pytest.mark.parametrize("together", [True, False])
def test_every_kind_of_delta_in_buckets_of_many_rows_and_of_one(served, together: bool) -> None:
    pair = made(served, "llama", *HELD)
    with on_gpu():
        answers, stats = ask_all(pair, greedy(3), together=together, max_num_seqs=8)
    assert_truth(pair, answers, PROMPT, 3)
    assert stats.n_eager_decode_steps == 0


@pytest.mark.slow
def test_variants_evicted_and_reloaded_beside_graphs(served) -> None:
    pair = made(served, "llama", *HELD, tied=False)
    with on_gpu():
        limits = {"max_resident_variants": 2, "max_variants_per_step": 2}
        answers, stats = ask_all(pair, greedy(3), **limits)
    assert_truth(pair, answers, PROMPT, 3)
    assert len(stats.resident) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "qwen3", "gpt2"])
def test_other_architectures(served, kind: str) -> None:
    pair = made(served, kind, "blockdiag", "rows")
    with on_gpu():
        answers, stats = ask_all(pair, greedy(3))
    assert_truth(pair, answers, PROMPT, 3)
    assert stats.n_eager_decode_steps == 0


@pytest.mark.slow
def test_chunked_prefill_beside_decoding(served) -> None:
    prompt = list(range(5, 60))
    pair = made(served, "llama", "blockdiag", "impart", prompt=prompt)
    with on_gpu():
        limits = {"max_batch_tokens": 16, "kv_block_tokens": 4}
        answers, _ = ask_all(pair, greedy(3), prompt, **limits)
    assert_truth(pair, answers, prompt, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "extra_vocab"),
    [
        ({"mode": "reconstruct"}, 0),
        ({}, 3),
        ({"enforce_eager": True}, 0),
        ({"kernels": "torch"}, 0),
    ],
    ids=["reconstruct", "added vocabulary", "eager", "torch"],
)
def test_what_runs_without_graphs(served, settings: dict[str, Any], extra_vocab: int) -> None:
    pair = made(served, "llama", "blockdiag", extra_vocab=extra_vocab)
    with on_gpu():
        answers, stats = ask_all(pair, greedy(3), **settings)
    assert_truth(pair, answers, PROMPT, 3)
    assert stats.n_eager_decode_steps > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"base_quant": "int8"}, {"base_quant": "float8"}, {"dtype": "bfloat16"}]
)
def test_what_changes_the_numbers_answers(served, changes: dict[str, str]) -> None:
    pair = made(served, "llama", "blockdiag", "head")
    with on_gpu():
        answers, stats = ask_all(pair, greedy(3), **changes)
    assert all(len(tokens) == 3 for tokens in answers.values())
    assert stats.n_eager_decode_steps == 0


@pytest.mark.slow
def test_sampling_with_everything_asked_for(served) -> None:
    pair = made(served, "llama", "blockdiag")
    params = SamplingParams(
        max_tokens=3,
        min_tokens=2,
        temperature=0.8,
        top_k=5,
        top_p=0.9,
        min_p=0.01,
        seed=3,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        repetition_penalty=1.2,
        logprobs=3,
        prompt_logprobs=True,
        logit_bias=((3, 1.0),),
    )
    with on_gpu():
        first, _ = ask_all(pair, params)
    again, _ = ask_all(pair, params, device="cpu", kernels="torch")
    assert first == again, "a seed says the same on every device"


def test_start_up_check_runs_on_the_device() -> None:
    device = torch.device("cuda")
    with simulated_cuda() as gpu:
        check_kernels(TritonKernels(device), device, torch.float32)
    assert gpu.n_launches > 40
