"""Static batches of transformers and PEFT: the right tokens of the right variant, and batching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peers.static_models import (
    MixedAdapters,
    Request,
    SwappedCheckpoints,
    load_base,
    overwrite,
)
from benchmarks.peers.static_server import Batcher
from benchmarks.peers.variants import make_adapters

PROMPTS = ([40, 41, 42], [50, 51, 52, 53, 54], [60])
N_TOKENS = 6


def expected(model: torch.nn.Module, prompt: Sequence[int]) -> list[int]:
    """Greedy tokens by whole forward passes: no cache, no padding, no `generate`."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(N_TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def drain(request: Request) -> list[int]:
    tokens = []
    while (event := request.events.get(timeout=60)) is not None:
        assert isinstance(event, int), event
        tokens.append(event)
    return tokens


def requests(*names: str) -> list[Request]:
    return [Request(name, list(p), N_TOKENS) for name, p in zip(names, PROMPTS, strict=False)]


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(tiny_llama, folder, 2, rank=4)
    for path in folder.glob("*/adapter_config.json"):  # a scale at which tokens differ
        path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 800'))
    return {path.name: path for path in sorted(folder.iterdir())}


def test_swapped_checkpoints_generate_each_variants_own_tokens(
    tiny_llama: Path, tiny_llama_ft: Path
) -> None:
    model = SwappedCheckpoints(tiny_llama, "base", {"ft": tiny_llama_ft})
    seen = []
    for name, path in (("ft", tiny_llama_ft), ("base", tiny_llama), ("ft", tiny_llama_ft)):
        oracle = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        batch = requests(name, name, name)
        model.generate(batch)
        seen.append([drain(request) for request in batch])
        assert seen[-1] == [expected(oracle, prompt) for prompt in PROMPTS]
    assert seen[0] == seen[2] != seen[1]


def test_overwrite_with_other_tensors_is_refused(tiny_llama: Path, tiny_qwen2: Path) -> None:
    with pytest.raises(ValueError, match="the base has no"):
        overwrite(load_base(tiny_llama), tiny_qwen2)


def test_mixed_adapters_each_row_has_its_own(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    model = MixedAdapters(tiny_llama, "base", adapters)
    batch = requests("v001", "base", "v000")
    model.generate(batch)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
    assert drain(batch[1]) == expected(base, PROMPTS[1])
    for index, name in ((0, "v001"), (2, "v000")):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="auto")
        alone = expected(base, PROMPTS[index])
        merged = PeftModel.from_pretrained(base, adapters[name]).merge_and_unload()
        assert drain(batch[index]) == expected(merged, PROMPTS[index]) != alone


def test_run_batch_each_request_gets_its_own_number_of_tokens(tiny_llama: Path) -> None:
    batch = [Request("base", list(PROMPTS[0]), n) for n in (1, 4)]
    SwappedCheckpoints(tiny_llama, "base", {}).generate(batch)
    assert [len(drain(request)) for request in batch] == [1, 4]


class Recorder:
    """Answers nothing, remembers the batches."""

    def __init__(self, mixes: bool) -> None:
        self.mixes = mixes
        self.names = ["a", "b"]
        self.batches: list[str] = []

    def generate(self, batch: Sequence[Request]) -> None:
        self.batches.append("".join(request.model for request in batch))
        if self.batches[-1] == "bad":
            raise RuntimeError("no")


def run_batches(mixes: bool, models: str, max_batch: int, steps: int) -> list[str]:
    recorder = Recorder(mixes)
    batcher = Batcher(recorder, max_batch)
    for model in models:
        batcher.submit(Request(model, [1], 1))
    for _ in range(steps):
        batcher.step()
    return recorder.batches


def test_batcher_checkpoints_are_grouped_oldest_first() -> None:
    assert run_batches(False, "baabab", 2, 4) == ["bb", "aa", "a", "b"]


def test_batcher_adapters_are_mixed_in_order() -> None:
    assert run_batches(True, "abbab", 3, 2) == ["abb", "ab"]


def test_batcher_failure_reaches_every_request() -> None:
    batcher = Batcher(Recorder(True), 3)
    batch = [Request(model, [1], 1) for model in "bad"]
    for request in batch:
        batcher.submit(request)
    batcher.step()
    assert [str(request.events.get(timeout=5)) for request in batch] == ["no"] * 3
