"""Variants that untie the weights which their base has tied: each name has deltas of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.export.reconstruct import reconstruct
from tests.server.conftest import Served
from tests.server.engine.test_core import assert_true_text
from tests.server.helpers import CoreHarness
from tests.tiny import make_tiny, perturb

Make = Callable[..., CoreHarness]
PROMPT = "The quick brown fox"
NAMES = ["base", "tied", "untied", "lowrank", "head", "table", "grown"]
RATIOS = {"head": 31.0, "table": 31.0}  # of those that change little


def untie(tuned: Path, seed: int) -> None:
    """Give the fine-tune in this folder an output of its own."""
    model = AutoModelForCausalLM.from_pretrained(tuned)
    model.config.tie_word_embeddings = False
    table = model.get_input_embeddings().weight.detach()
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
    model.lm_head.weight = torch.nn.Parameter(table + 0.5 * table.std() * noise)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("untied")
    base = make_tiny("llama", folder / "base", seed=3, tied=True)
    checkpoints, deltas = {"base": base}, folder / "deltas"
    deltas.mkdir()
    for seed, name in enumerate(NAMES[1:]):
        keep = {"head": ("model",), "table": ("layers",)}.get(name, ())
        grown = 3 if name == "grown" else 0
        tuned = perturb(base, folder / name, seed=seed, keep=keep, extra_vocab=grown)
        if name == "table":  # the output is the base's table, the embedding is not
            model = AutoModelForCausalLM.from_pretrained(tuned)
            model.config.tie_word_embeddings = False
            before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
            model.lm_head.weight = torch.nn.Parameter(before.detach().clone())
            model.save_pretrained(tuned)
        elif name != "tied":
            untie(tuned, seed)
        codec = "lowrank" if name in ("lowrank", "grown") else "blockdiag"
        compress(base, tuned, deltas / name, Options(codec=codec, ratio=RATIOS.get(name, 7)))
        out = folder / f"merged-{name}"
        checkpoints[name] = reconstruct(base, deltas / name, out, dtype="float32")
    return Served(base, deltas, checkpoints)


@pytest.mark.parametrize(
    ("static", "mode"), [(False, "apply"), (True, "apply"), (False, "reconstruct")]
)
def test_untied_variants_alone_and_mixed_have_true_text(
    zoo: Served, harness: Make, static: bool, mode: str
) -> None:
    engine = harness(zoo, static=static, mode=mode, kernels="torch")
    for name in NAMES:
        one = engine.submit(name, PROMPT)
        engine.run(one)
        assert_true_text(zoo, one)
    mixed = [engine.submit(name, PROMPT) for name in NAMES]
    engine.run(*mixed)
    assert_true_text(zoo, *mixed)
    engine.assert_idle()


def test_untied_variants_leave_no_trace_when_they_are_evicted(zoo: Served, harness: Make) -> None:
    engine = harness(zoo, max_resident_variants=1, kernels="torch")
    for name in ["untied", "tied", "grown", "base", "table", "untied", "tied"]:
        one = engine.submit(name, PROMPT)
        engine.run(one)
        assert_true_text(zoo, one)
