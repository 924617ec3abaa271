"""A base stored quantised is served as its dequantised weights, alone and under deltas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from compressor.checkpoint.folder import resolve
from compressor.compress.pipeline import compress
from compressor.export.reconstruct import reconstruct
from server.errors import ConfigError
from server.model.base import load_base_model
from server.ops.kernels import TorchKernels
from server.process.inputs import located, stored_model
from server.settings import Settings
from tests.compressor.checkpoint.quantised.schemes import SCHEMES
from tests.gguf_files import write_gguf
from tests.quantised import dense_twin, quantise
from tests.server.conftest import PAIR, Served
from tests.server.helpers import CoreHarness
from tests.tiny import Kind, make_tiny, perturb

PROMPTS = ("The quick brown fox", "I would like to book a table")


def served_from(base: Path, original: Path, truth: Path, folder: Path) -> Served:
    """Deltas of fine-tunes of `original` against `base`, which is served; `truth` is it, dense."""
    checkpoints = {"base": truth}
    (folder / "deltas").mkdir()
    for i, (name, options) in enumerate(PAIR.items()):
        tuned = perturb(original, folder / f"ft-{name}", seed=10 + i, scale=0.1)
        compress(base, tuned, folder / "deltas" / name, options)
        checkpoints[name] = reconstruct(
            base, folder / "deltas" / name, folder / f"merged-{name}", dtype="float32"
        )
    return Served(base, folder / "deltas", checkpoints)


def assert_tokens_equal_generate(served: Served, engine: CoreHarness) -> None:
    sent = [
        (name, engine.submit(name, prompt, max_tokens=20))
        for prompt in PROMPTS
        for name in served.checkpoints
    ]
    engine.run(*(recorded for _, recorded in sent))
    for name, recorded in sent:
        assert recorded.error is None
        assert recorded.output_ids == served.truth(name, recorded.request.prompt_ids), name


@pytest.mark.parametrize(
    ("kind", "scheme"), [("llama", "gptq-4-act-order-asymmetric"), ("gemma", "fp8-blocks")]
)
def test_engine_on_a_quantised_base_equals_generate_on_the_dense_weights(
    harness: Callable[..., CoreHarness], tmp_path: Path, kind: Kind, scheme: str
) -> None:
    original = make_tiny(kind, tmp_path / "base", seed=3)
    base = quantise(original, tmp_path / "q", SCHEMES[scheme])
    truth = dense_twin(base, tmp_path / "twin", SCHEMES[scheme])
    served = served_from(base, original, truth, tmp_path)
    assert_tokens_equal_generate(served, harness(served, kernels=TorchKernels()))


def test_engine_on_a_gguf_base_equals_generate_on_the_dense_weights(
    harness: Callable[..., CoreHarness], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    original = make_tiny("llama", tmp_path / "base", seed=3, intermediate_size=96)
    file = write_gguf(original, tmp_path / "tiny.gguf")
    found = located(Settings(base=file, device="cpu", kv_cache_bytes=8 << 20))
    assert found.served_base_name == "tiny"
    served = served_from(file, original, resolve(file), tmp_path)
    assert_tokens_equal_generate(
        served, harness(Served(found.base, served.deltas, {}), kernels=TorchKernels())
    )


def test_start_up_says_how_the_base_is_stored(tiny_llama: Path, tmp_path: Path) -> None:
    folder = quantise(tiny_llama, tmp_path / "q", SCHEMES["packed-4"], "bfloat16")
    dense, stored = stored_model(tiny_llama), stored_model(folder)
    assert stored.n_parameters == dense.n_parameters
    assert stored.number_format == (
        "bfloat16 (stored as compressed-tensors int4, dequantised once)"
    )
    assert dense.number_format == "float32"


def test_base_quantised_in_a_way_that_is_not_read_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    scheme = SCHEMES["gptq-4"]
    scheme.config["quant_method"], before = "aqlm", scheme.config["quant_method"]
    try:
        folder = quantise(tiny_llama, tmp_path / "q", scheme)
    finally:
        scheme.config["quant_method"] = before
    with pytest.raises(ConfigError, match="quantised by aqlm") as refused:
        load_base_model(folder, torch.device("cpu"), None, "torch")
    assert "\n" not in refused.value.message
