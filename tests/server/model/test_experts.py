"""Mixture-of-experts variants against Hugging Face `generate` on reconstructed weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.artifact.reader import read_artifact
from compressor.artifact.writer import ArtifactWriter
from compressor.compress.options import NO_CODER, Options
from compressor.compress.pipeline import compress
from compressor.export.reconstruct import reconstruct
from tests.models.builder import build, prompt_of
from tests.models.cases import Case
from tests.server.conftest import Served
from tests.server.engine.test_core import assert_true_text
from tests.server.helpers import CoreHarness

Make = Callable[..., CoreHarness]
CODECS = {
    "blockdiag": Options(codec="blockdiag", ratio=9, entropy=NO_CODER),  # see `keep_one_matrix`
    "lowrank": Options(codec="lowrank", ratio=7),
}
# The others take the same ways; the matrix of architectures has them all.
FAST = ("mixtral", "qwen2_moe", "granitemoeshared")
SLOW = (
    "olmoe",
    "qwen3_moe",
    "deepseek_v3",
    "phimoe",
    "ernie4_5_moe",
    "cohere2_moe",
    "minimax_m2",
    "llama4_text",
    "gpt_oss",
    "deepseek_v2",
)
CHANGES = {
    # Past `floor_scale` rows its attention takes a row's place in the step for its position.
    "llama4_text": {"floor_scale": 8192, "interleave_moe_layer_step": 1},
}
PROMPTS = (prompt_of(5, seed=1), prompt_of(30, seed=2))
TOLERANCE = 2e-4


def build_moe(name: str, folder: Path) -> Served:
    """Two full fine-tunes, a codec each, and one that changes a single matrix of one expert."""
    pair = build(Case(name, name, CHANGES.get(name, {})), folder)
    deltas, checkpoints = folder / "deltas", {"base": pair.base}
    deltas.mkdir()
    for (variant, options), tuned in zip(CODECS.items(), pair.finetunes, strict=True):
        compress(pair.base, tuned, deltas / variant, options)
    keep_one_matrix(deltas / "blockdiag", deltas / "one-matrix")
    for variant in (*CODECS, "one-matrix"):
        checkpoints[variant] = reconstruct(
            pair.base, deltas / variant, folder / f"merged-{variant}", dtype="float32"
        )
    return Served(pair.base, deltas, checkpoints)


def keep_one_matrix(delta: Path, out: Path) -> None:
    artifact = read_artifact(delta)
    of_one = [
        tensor for tensor in artifact.tensors if re.search(r"experts\.1\.|\[1\]", tensor.name)
    ]
    with ArtifactWriter(out, run_key="one") as writer:
        writer.add(of_one[-1])
        writer.finish(artifact.config, artifact.aux)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def make(name: str) -> Served:
        if name not in made:
            made[name] = build_moe(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def assert_true_logprobs(served: Served, engine: CoreHarness, name: str) -> None:
    """Of the chosen tokens, against one forward pass without a cache."""
    prompt = PROMPTS[1]
    sent = engine.submit(name, prompt, max_tokens=6, logprobs=0)
    engine.run(sent)
    ids = torch.tensor([prompt + sent.output_ids])
    with torch.no_grad():
        want = served.oracle(name)(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    got = [token.logprob for chunk in sent.chunks for token in chunk.logprobs or ()]
    assert len(got) == len(sent.output_ids)
    for i, (token, logprob) in enumerate(zip(sent.output_ids, got, strict=True)):
        assert abs(logprob - float(want[len(prompt) + i - 1, token])) < TOLERANCE


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_variants_mixed_in_a_batch_equal_generate(
    moe: Callable[[str], Served], harness: Make, name: str
) -> None:
    served = moe(name)
    engine = harness(served, kernels="torch")
    sent = [engine.submit(v, p) for p in PROMPTS for v in served.checkpoints]
    engine.run(*sent)
    assert_true_text(served, *sent)
    for variant in served.checkpoints:
        assert_true_logprobs(served, engine, variant)
    engine.assert_idle()


def test_variants_on_compiled_kernels_equal_generate(
    moe: Callable[[str], Served], harness: Make
) -> None:
    served = moe("mixtral")
    engine = harness(served)
    sent = [engine.submit(v, p) for p in PROMPTS for v in served.checkpoints]
    engine.run(*sent)
    assert_true_text(served, *sent)


def test_mode_reconstruct_leaves_experts_to_their_terms(
    moe: Callable[[str], Served], harness: Make
) -> None:
    served = moe("mixtral")
    engine = harness(served, kernels="torch", mode="reconstruct")
    sent = [engine.submit(v, p) for p in PROMPTS for v in served.checkpoints]
    engine.run(*sent)
    assert_true_text(served, *sent)


def test_static_steps_run_deltas_of_experts_eagerly(
    moe: Callable[[str], Served], harness: Make, caplog: pytest.LogCaptureFixture
) -> None:
    served = moe("mixtral")
    engine = harness(served, kernels="torch", static=True)
    sent = [engine.submit(v, p) for p in PROMPTS for v in ("base", "one-matrix", "blockdiag")]
    engine.run(*sent)
    assert_true_text(served, *sent)
    assert "run without a CUDA graph, slower" in caplog.text
    base = engine.submit("base", PROMPTS[0])
    before = engine.core.stats().n_static_steps
    engine.run(base)
    assert engine.core.stats().n_static_steps > before


def test_evicted_experts_leave_their_places(moe: Callable[[str], Served], harness: Make) -> None:
    served = moe("mixtral")
    engine = harness(served, kernels="torch", max_resident_variants=1)
    for variant in ("blockdiag", "lowrank", "one-matrix", "blockdiag"):
        sent = engine.submit(variant, PROMPTS[0])
        engine.run(sent)
        assert_true_text(served, sent)
