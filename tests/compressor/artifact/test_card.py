"""The model card, read by huggingface_hub: what it states, and what it must not make up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard

from compressor.artifact.card import model_card, own_facts
from compressor.artifact.reader import read_artifact
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from tests.compressor.artifacts import CONFIG
from tests.tiny import CORPUS, perturb

OWN = """---
license: cc-by-4.0
language: en
datasets: [PolyAI/banking77]
tags: [finance]
model-index: []
---
# Ours
"""


def card(**changes: Any) -> ModelCard:
    return ModelCard(model_card(replace(CONFIG, **changes), 4_000), ignore_metadata_errors=False)


def test_card_metadata_of_a_measured_delta_is_what_the_hub_reads() -> None:
    found = card()
    data = found.data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "impart-serve"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["impart-delta", "delta-compression", "blockdiag"]
    assert "license" not in data
    kl, agreement = found.data.eval_results
    assert isinstance(kl, EvalResult)
    assert (kl.metric_type, kl.metric_value) == ("kl_divergence", 0.01)
    assert (agreement.metric_type, agreement.metric_value) == ("top1_agreement", 0.99)
    assert data["model-index"][0]["name"] == "me/ft"
    assert "4,000 bytes instead of 123,456, 30.9 times\nsmaller" in found.text
    assert "on 9 tokens" in found.text
    for heading in ("## Limits", "impart reconstruct BASE", "| codec | `blockdiag`: bits 3 |"):
        assert heading in found.text


def test_card_without_a_measurement_has_no_results_and_says_so() -> None:
    found = card(fidelity={})
    assert found.data.eval_results is None
    assert "model-index" not in found.data.to_dict()
    assert "was not measured" in found.text


def test_card_names_the_directory_that_is_no_hub_id() -> None:
    assert "`--base-name`" not in card().text
    assert "`--base-name`" in card(base=replace(CONFIG.base, name_or_path="my base")).text


@pytest.mark.parametrize("name", ["a: b\n---\nlicense: mit", "'\"", "\x1b[31m", "- x", "null", "é"])
def test_hostile_names_stay_inside_their_field(name: str) -> None:
    found = card(finetuned=name, base=replace(CONFIG.base, name_or_path=name))
    assert found.data.base_model == name
    assert "license" not in found.data.to_dict()
    assert "\x1b" not in found.text


def test_compress_takes_the_licence_of_the_finetunes_own_card_and_nothing_else(
    tiny_llama: Path, tmp_path: Path
) -> None:
    tuned = perturb(tiny_llama, tmp_path / "tuned")
    (tuned / "README.md").write_text(OWN)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(CORPUS))
    options = Options(codec="blockdiag", ratio=8, calibration=texts, base_name="org/base")
    summary = compress(tiny_llama, tuned, tmp_path / "out", options)
    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert found.data.license == "cc-by-4.0"
    assert found.data.language == ["en"]
    assert found.data.datasets == ["PolyAI/banking77"]
    assert found.data.tags == ["impart-delta", "delta-compression", "blockdiag"]
    assert found.data.eval_results[0].metric_value == summary.fidelity["kl_per_token"]
    assert "The licence above is the fine-tune's" in found.text
    assert read_artifact(tmp_path / "out").config.finetuned_details["card"] == own_facts(tuned)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no metadata",
        "---\n- a\n---\n",
        "---\na: [\n---\n",
        "---\nlicense: [mit]\n---\n",
        "---\nlicense: 3\ndatasets: {a: b}\nlanguage: ['en', 7]\n---\n",
        '---\nlicense: "\\e[31m"\n---\n',
    ],
)
def test_a_card_that_states_nothing_usable_gives_no_facts(tmp_path: Path, text: str) -> None:
    assert own_facts(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert own_facts(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert own_facts(tmp_path) == {}
