"""Sinks that fine-tunes have changed: rows of several attend together, each with its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.compress.pipeline import compress
from compressor.export.reconstruct import reconstruct
from server.model.fused_attention import RotaryAttention
from server.ops.kernels import TorchKernels
from tests.server.conftest import N_TRUTH, PAIR, Served
from tests.server.helpers import CoreHarness
from tests.server.model.test_base import PROMPTS, assert_parity
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def sinking(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A base with sinks, and two fine-tunes whose sinks take much more and much less."""
    folder = tmp_path_factory.mktemp("sinks")
    layers = ["sliding_attention", "full_attention"]
    base = make_tiny(
        "granite_swa",  # type: ignore[arg-type]
        folder / "base",
        seed=3,
        sliding_window=8,
        layer_types=layers,
    )
    checkpoints = {"base": base}
    for name, shift in (("drained", 3.0), ("dry", -4.0)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if path.endswith("sinks"):
                    weight += shift
                elif weight.dim() == 2:
                    weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
        tuned = folder / f"ft-{name}"
        model.save_pretrained(tuned)
        for file in base.glob("*token*"):
            (tuned / file.name).write_bytes(file.read_bytes())
        compress(base, tuned, folder / "deltas" / name, PAIR["blockdiag"])
        checkpoints[name] = reconstruct(
            base, folder / "deltas" / name, folder / f"merged-{name}", dtype="float32"
        )
    return Served(base, folder / "deltas", checkpoints)


@pytest.mark.parametrize("static", [False, True])
def test_variants_with_sinks_of_their_own_in_one_batch_equal_generate(
    sinking: Served, harness: Callable[..., CoreHarness], static: bool
) -> None:
    engine = harness(sinking, static=static, kernels=TorchKernels(), max_batch_tokens=40)
    assert_parity(engine, sinking)
    modules = list(engine.core._runner.base.store.layers)
    assert all(isinstance(module.forward, RotaryAttention) for module in modules)
    if static:
        assert engine.core._runner.counts.eager == 0


def test_sinks_change_the_text(sinking: Served) -> None:
    prompt = [5, 6, 7, 8, 9, 10, 11, 12]
    texts = [sinking.truth(name, prompt) for name in sinking.checkpoints]
    assert len({tuple(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("mode", ["apply", "reconstruct"])
def test_slot_given_back_has_the_bases_sinks(
    sinking: Served, harness: Callable[..., CoreHarness], mode: str
) -> None:
    engine = harness(sinking, kernels=TorchKernels(), max_resident_variants=1, mode=mode)
    for name in ("drained", "base", "dry", "drained"):
        request = engine.submit(name, PROMPTS[1], max_tokens=N_TRUTH)
        engine.run(request)
        assert request.output_ids == sinking.truth(name, request.request.prompt_ids), name
