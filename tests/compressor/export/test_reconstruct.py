"""Base + delta back to a Hugging Face directory, checked with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressor.artifact.reader import read_artifact
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError, OutputError, WrongBase
from compressor.export.reconstruct import reconstruct
from tests.corners import corners
from tests.tiny import Kind, make_tiny, perturb


def merged(base: Path, artifact_dir: Path) -> dict[str, torch.Tensor]:
    """``W_base + sum(to_dense())``, rows stored exactly put in: a literal oracle."""
    tensors = load_file(base / "model.safetensors")
    for delta in read_artifact(artifact_dir).tensors:
        weight = tensors[delta.name].float()
        if delta.transposed:
            weight = weight.T
        full = torch.zeros(delta.shape)
        full[: weight.shape[0]] = weight
        for term in delta.terms:
            full[: weight.shape[0]] += term.to_dense()
        if delta.exact is not None:
            start = delta.exact.row_start
            full[start : start + len(delta.exact.values)] = delta.exact.values.float()
        tensors[delta.name] = full.T if delta.transposed else full
    return tensors


@pytest.mark.parametrize(
    ("kind", "tied", "codec"),
    corners(
        [("llama", False), ("llama", True), ("qwen2", False), ("gemma", True), ("gpt2", True)],
        ["blockdiag", "impart", "impart-qt", "lowrank"],
    ),
)
def test_reconstruct_equals_base_plus_dense_and_loads(
    kind: Kind, tied: bool, codec: str, tmp_path: Path
) -> None:
    base = make_tiny(kind, tmp_path / "base", seed=1, tied=tied)
    tuned = perturb(base, tmp_path / "tuned", seed=2)
    ratio = 13 if codec == "impart-qt" else 10  # its largest setting is small
    compress(base, tuned, tmp_path / "delta", Options(codec=codec, ratio=ratio))
    reconstruct(base, tmp_path / "delta", tmp_path / "out")
    expected = merged(base, tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in tuned.iterdir()}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids


def test_reconstruct_added_vocabulary_and_own_template(
    tiny_llama: Path, tiny_llama_ft_vocab: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft_vocab, tmp_path / "delta", Options(ratio=8))
    out = reconstruct(tiny_llama, tmp_path / "delta", tmp_path / "out")
    expected = load_file(tiny_llama_ft_vocab / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["lm_head.weight"][320:], expected["lm_head.weight"][320:])
    assert torch.equal(found["model.norm.weight"], expected["model.norm.weight"])
    assert AutoConfig.from_pretrained(out).vocab_size == 323
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("<extra_1>", add_special_tokens=False).input_ids == [321]
    theirs = AutoTokenizer.from_pretrained(tiny_llama_ft_vocab)
    assert tokenizer.chat_template == theirs.chat_template
    AutoModelForCausalLM.from_pretrained(out)


def test_reconstruct_sharded_output_loads(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", Options(ratio=10))
    reconstruct(tiny_llama, tmp_path / "delta", tmp_path / "one")
    reconstruct(tiny_llama, tmp_path / "delta", tmp_path / "many", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_reconstruct_dtype_is_the_fine_tunes_unless_given(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    tuned = perturb(base, tmp_path / "tuned", dtype=torch.float16, keep=("layers.0",))
    compress(base, tuned, tmp_path / "delta", Options(ratio=5))
    own = reconstruct(base, tmp_path / "delta", tmp_path / "own")
    assert {t.dtype for t in load_file(own / "model.safetensors").values()} == {torch.float16}
    assert AutoConfig.from_pretrained(own).dtype == torch.float16
    wide = reconstruct(base, tmp_path / "delta", tmp_path / "wide", dtype="float32")
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}
    with pytest.raises(InputError, match="dtype"):
        reconstruct(base, tmp_path / "delta", tmp_path / "x", dtype="int8")


def test_reconstruct_wrong_base_raises_and_leaves_nothing(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", Options(ratio=10))
    with pytest.raises(WrongBase):
        reconstruct(tiny_llama_ft, tmp_path / "delta", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["delta"]


def test_reconstruct_never_replaces_what_is_no_model(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", Options(ratio=10))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists"):
            reconstruct(tiny_llama, tmp_path / "delta", out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "the only copy"
    (out / "thesis.txt").unlink()
    reconstruct(tiny_llama, tmp_path / "delta", out)
    reconstruct(tiny_llama, tmp_path / "delta", out, overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["delta", "out"]


def test_reconstruct_failing_write_leaves_nothing(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", Options(ratio=10))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compressor.export.reconstruct.copy_companions", full)
    with pytest.raises(OutputError, match="No space left"):
        reconstruct(tiny_llama, tmp_path / "delta", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["delta"]


FURTHER = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "mistral": {},
    "phi3": {},  # q, k, v in one Linear; gate and up in another
    "qwen3": {},
}


@pytest.mark.parametrize("kind", FURTHER)
def test_reconstruct_further_architectures_round_trip(kind: str, tmp_path: Path) -> None:
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **fields, **FURTHER[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for p in model.parameters():
            # Changes of rank 1, which the codec can express exactly.
            p += 0.05 * (torch.randn(p.shape[0]) if p.ndim == 1 else rank_one(*p.shape))
    model.save_pretrained(tmp_path / "tuned")
    options = Options(codec="lowrank", codec_options={"bits": 32}, ratio=4)
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", options)
    reconstruct(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-3, atol=1e-3)


def rank_one(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, 1) @ torch.randn(1, n)
