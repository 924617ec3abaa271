"""Served directories: a tiny base and deltas of its fine-tunes, made with our own compressor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.artifact.reader import read_artifact
from compressor.artifact.writer import ArtifactWriter
from compressor.compress.options import NO_CODER, Options
from compressor.compress.pipeline import compress
from compressor.encoders.blockdiag import BlockDiagCodec
from compressor.encoders.sources import TensorSource
from compressor.export.reconstruct import reconstruct
from server.text.workers.pool import TextWorkers
from tests.server.helpers import CoreHarness
from tests.server.shared_workers import lending, usual_limits
from tests.tiny import Kind, make_tiny, perturb

PAIR = {
    "blockdiag": Options(codec="blockdiag", ratio=9),
    "impart": Options(codec="impart", ratio=7),
}
ALL_CODECS = PAIR | {
    "head": Options(codec="blockdiag", ratio=9, codec_options={"head_fraction": 0.3}),
    "lowrank": Options(codec="lowrank", ratio=7),
    "rows": Options(codec="blockdiag", ratio=9, entropy=NO_CODER),  # see `keep_rows`
    "impart-qt": Options(codec="impart-qt", ratio=12, codec_options={"beta": 0.0}),
    "other-blocks": Options(codec="blockdiag", ratio=11, codec_options={"bits": 3}),
}
VOCABULARY = ("embed", "wte", "lm_head")  # in names of matrices with a row a token
N_TRUTH = 20  # tokens of every oracle text


@dataclass(frozen=True)
class Served:
    """A base, a deltas directory, and for each name the checkpoint that is the truth for it."""

    base: Path
    deltas: Path
    checkpoints: dict[str, Path]
    _oracles: dict[str, PreTrainedModel] = field(default_factory=dict, repr=False)
    _truths: dict[tuple[str, tuple[int, ...]], list[int]] = field(default_factory=dict, repr=False)

    def oracle(self, name: str) -> PreTrainedModel:
        """Hugging Face model of the base or of a variant's reconstructed checkpoint."""
        if name not in self._oracles:
            self._oracles[name] = AutoModelForCausalLM.from_pretrained(
                self.checkpoints[name], dtype=torch.float32
            )
        return self._oracles[name]

    def truth(self, name: str, prompt: list[int]) -> list[int]:
        """What `generate` continues greedily: `N_TRUTH` tokens, or up to its first EOS."""
        key = (name, tuple(prompt))
        if key not in self._truths:
            model = self.oracle(name)
            out = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=N_TRUTH, pad_token_id=0
            )[0].tolist()[len(prompt) :]
            eos = model.generation_config.eos_token_id
            stops = eos if isinstance(eos, list) else [eos]
            end = next((i + 1 for i, token in enumerate(out) if token in stops), len(out))
            self._truths[key] = out[:end]
        return self._truths[key]


def build_served(
    folder: Path,
    kind: Kind,
    codecs: dict[str, Options],
    *,
    extra_vocab: int = 0,
    **config: object,
) -> Served:
    """Compress one fine-tune per entry and reconstruct it, both with the public functions."""
    base = make_tiny(kind, folder / "base", seed=3, **config)
    checkpoints = {"base": base}
    deltas = folder / "deltas"
    deltas.mkdir()
    for i, (name, options) in enumerate(codecs.items()):
        tuned = perturb(
            base, folder / f"ft-{name}", seed=10 + i, scale=0.1, extra_vocab=extra_vocab
        )
        compress(base, tuned, deltas / name, options)
        if name == "rows":
            keep_rows(deltas / name)
        checkpoints[name] = reconstruct(
            base, deltas / name, folder / f"merged-{name}", dtype="float32"
        )
        read_artifact(deltas / name)
    return Served(base, deltas, checkpoints)


def keep_rows(delta: Path) -> None:
    """Give vocabulary matrices a head and some whole rows instead of blocks, as `auto` may."""
    artifact = read_artifact(delta)
    shutil.rmtree(delta)
    codec = BlockDiagCodec(bits=2)
    with ArtifactWriter(delta, run_key="rows") as writer:
        for tensor in artifact.tensors:
            if tensor.terms and any(word in tensor.name for word in VOCABULARY):
                dense = torch.stack([term.to_dense() for term in tensor.terms]).sum(0)
                params = codec.settings(2, 0, n_rows=9)
                terms = codec.encode(tensor.name, TensorSource(dense), params, 0)
                tensor = replace(tensor, terms=terms)
            writer.add(tensor)
        writer.finish(artifact.config, artifact.aux)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Served]:
    """Factory with a cache: the same arguments give the same directories."""
    made: dict[str, Served] = {}

    def make(kind: Kind, codecs: dict[str, Options], **more: object) -> Served:
        key = repr((kind, codecs, more))
        if key not in made:
            made[key] = build_served(tmp_path_factory.mktemp(kind), kind, codecs, **more)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_pool() -> Iterator[TextWorkers]:
    """One process for the whole run."""
    pool = TextWorkers(1, usual_limits())
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def shared_text_workers(text_pool: TextWorkers) -> Iterator[None]:
    """Engines of the module share a text worker. What tests the workers has some of its own."""
    with lending(text_pool):
        yield


@pytest.fixture
def harness(shared_text_workers: None) -> Iterator[Callable[..., CoreHarness]]:
    """Make engine cores over a Served; they are closed afterwards."""
    made: list[CoreHarness] = []

    def make(served: Served, **settings: object) -> CoreHarness:
        made.append(CoreHarness(served.base, served.deltas, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def poisoned(served: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The llama pair and `poison`, a valid finite delta whose activations overflow: from the first
    layer on, its keys and values are not finite.
    """
    pair = served("llama", PAIR)
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(pair.deltas, folder / "deltas")
    tuned = perturb(pair.base, folder / "ft", seed=99, scale=0.1)
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight").fill_(3e38)
    model.save_pretrained(tuned)
    compress(pair.base, tuned, folder / "deltas" / "poison", PAIR["blockdiag"])
    return replace(pair, deltas=folder / "deltas")
