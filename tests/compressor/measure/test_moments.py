"""Texts of any form, and input moments against a hook-free recomputation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.artifact.reader import read_artifact
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import CheckpointError, InputError
from compressor.measure.fidelity import encode_texts, load_model
from compressor.measure.moments import InputMoments, hessians
from compressor.measure.texts import load_texts, texts_digest
from tests.tiny import CORPUS, make_tiny, perturb

TEXTS = list(CORPUS)


def test_load_texts_without_a_file_gives_the_built_in_set() -> None:
    texts = load_texts(None)
    assert 64 <= len(texts) == len(set(texts)) <= 128
    assert all(text.strip() for text in texts)
    assert load_texts(None, limit=3) == texts[:3]
    assert len(texts_digest(texts)) == 16
    assert texts_digest(texts) != texts_digest(texts[:-1])


def test_load_texts_parquet_reads_the_text_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "x.parquet"
    table = pa.table({"id": [1, 2, 3, 4], "text": ["one", None, " ", "two\nlines"]})
    parquet.write_table(table, file)
    assert load_texts(file) == ["one", "two\nlines"]
    assert load_texts(file, limit=1) == ["one"]


def test_load_texts_unusable_parquet_raises_input_error(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"words": ["one"]}), file)
    with pytest.raises(InputError, match='no column "text", only words'):
        load_texts(file)
    parquet.write_table(pa.table({"text": [1]}), file)
    with pytest.raises(InputError, match="does not hold strings"):
        load_texts(file)
    file.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        load_texts(file)
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        load_texts(tmp_path / "none.parquet")


def test_load_texts_parquet_without_pyarrow_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"impart-serve\[parquet\]"):
        load_texts(tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hessians_are_the_mean_outer_product_of_the_inputs(kind: str, tmp_path: Path) -> None:
    tuned = make_tiny(kind, tmp_path / "tuned", seed=4)
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval()
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    found = dict(hessians(tuned, TEXTS, names))
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear,) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(
                lambda _, args, key=f"{name}.weight": inputs.setdefault(key, []).append(args[0][0])
            )
    with torch.no_grad():
        for ids in encode_texts(tokenizer, TEXTS):
            model(input_ids=torch.tensor([ids]))
    if kind == "gpt2":  # the output layer's weight is the embedding
        inputs["transformer.wte.weight"] = inputs.pop("lm_head.weight")
    assert set(found) == set(inputs)
    for name, parts in inputs.items():
        x = torch.cat(parts).double()
        torch.testing.assert_close(
            found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6 * float(x.square().max())
        )


def test_input_moments_little_memory_gives_the_same_in_more_passes(tmp_path: Path) -> None:
    tuned = make_tiny("llama", tmp_path / "tuned", seed=4)
    model = load_model(tuned)
    samples = encode_texts(AutoTokenizer.from_pretrained(tuned), TEXTS[:2])
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    at_once = InputMoments(model, samples, names)
    one_by_one = InputMoments(model, samples, names, memory_bytes=1)
    assert one_by_one.names == at_once.names
    assert len(at_once._groups) == 1
    assert len(one_by_one._groups) == 2 * 4 + 1  # qkv, o, gate and up, down; lm_head
    for name in reversed(at_once.names):
        a, b = at_once.get(name), one_by_one.get(name)
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b)
    assert at_once.get("model.embed_tokens.weight") is None
    assert at_once.get("model.layers.0.input_layernorm.weight") is None


def test_input_moments_without_tokenizer_raises_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="tokenizer"):
        InputMoments.of_checkpoint(tmp_path, TEXTS, [])


def test_compress_gptq_uses_the_calibration_texts_and_says_so(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", seed=1)
    tuned = perturb(base, tmp_path / "tuned", seed=2)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    made = {}
    for name, calibration in [("built-in", None), ("own", texts), ("again", texts)]:
        options = Options(
            codec="impart-qt",
            codec_options={"gptq": True, "beta": 0.0},
            ratio=12,
            calibration=calibration,
        )
        made[name] = compress(base, tuned, tmp_path / name, options)
    digests = {name: summary.digest for name, summary in made.items()}
    assert digests["own"] == digests["again"]
    assert digests["own"] != digests["built-in"]
    config = read_artifact(tmp_path / "own").config
    assert config.options["gptq"] is True
    assert config.finetuned_details["calibration"] == texts_digest(TEXTS)
    used = {entry.name: entry.terms[0].params["gptq"] for entry in config.tensors if entry.terms}
    assert used.pop("model.embed_tokens.weight") is False  # no product, hence no input
    assert all(used.values())
