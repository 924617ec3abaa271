"""Whole merges against task vectors computed from the files with the safetensors library."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressor.artifact.reader import read_artifact, read_config
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import TensorSource
from compressor.errors import InputError, OutputError, UnsupportedTensor, WrongBase
from compressor.merge.config import MergeConfig, MergeModel, constant
from compressor.merge.merge import merge, merge_to_delta
from compressor.merge.rules import dare_mask
from tests.compressor.cli.test_app import impart, one_line_error
from tests.compressor.merge.test_rules import ties_element_by_element
from tests.compressor.peft.test_adapter import Q, adapter, lora
from tests.tiny import make_tiny, perturb


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}


def task_vector(base: Path, tuned: Path) -> dict[str, Tensor]:
    ours, theirs = weights(base), weights(tuned)
    return {name: theirs[name] - ours[name] for name in ours}


def models(*names: Path, **settings: float) -> tuple[MergeModel, ...]:
    given = {key: constant(value) for key, value in settings.items()}
    return tuple(MergeModel(str(name), **given) for name in names)


def assert_weights(out: Path, expected: dict[str, Tensor]) -> None:
    found = weights(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(params=["llama", "gpt2"])
def trio(request: pytest.FixtureRequest) -> tuple[Path, Path, Path]:
    """A base and two fine-tunes; GPT-2 stores its matrices the other way round."""
    kind = request.param
    base: Path = request.getfixturevalue(f"tiny_{kind}")
    one: Path = request.getfixturevalue(f"tiny_{kind}_ft")
    other = base.parent / f"{kind}-merge-other"
    if not other.exists():
        perturb(base, other, seed=11, scale=0.2, keep=("mlp",))
    return base, one, other


def test_merge_task_arithmetic_equals_the_formula(
    trio: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.merge.merge.CHUNK_ELEMENTS", 1000)  # several pieces a tensor
    base, one, other = trio
    config = MergeConfig(
        str(base),
        (
            MergeModel(str(one), weight=constant(0.7)),
            MergeModel(str(other), weight=constant(-0.2)),
        ),
        method="ta",
        scale=1.5,
    )
    merge(config, tmp_path / "out")
    first, second = task_vector(base, one), task_vector(base, other)
    expected = {n: w + 1.5 * (0.7 * first[n] - 0.2 * second[n]) for n, w in weights(base).items()}
    assert_weights(tmp_path / "out", expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.arange(5).unsqueeze(0)).logits.isfinite().all()
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_merge_ties_equals_the_element_loop(
    trio: tuple[Path, Path, Path], tmp_path: Path, scope: str
) -> None:
    base, one, other = trio
    config = MergeConfig(
        str(base),
        models(one, other, density=0.3),
        scale=0.9,
        trim_scope=scope,  # type: ignore[arg-type]
    )
    merge(config, tmp_path / "out")
    vectors = [task_vector(base, one), task_vector(base, other)]
    names = list(vectors[0])
    merged: dict[str, list[float]] = {}
    if scope == "tensor":
        for name in names:
            columns = [v[name].float().flatten().tolist() for v in vectors]
            merged[name] = ties_element_by_element(columns, [1, 1], 0.3)
    else:
        flat = [torch.cat([v[n].float().flatten() for n in names]).tolist() for v in vectors]
        whole = ties_element_by_element(flat, [1, 1], 0.3)
        for name in names:
            size = vectors[0][name].numel()
            merged[name], whole = whole[:size], whole[size:]
    ours = weights(base)
    expected = {
        n: ours[n] + 0.9 * torch.tensor(merged[n], dtype=torch.float64).view(ours[n].shape)
        for n in names
    }
    assert_weights(tmp_path / "out", expected)


def test_merge_dare_drops_and_rescales_by_the_named_mask(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    for seed in (3, 4):
        config = MergeConfig(
            str(tiny_llama),
            models(tiny_llama_ft, mask_density=0.25),
            method="ta",
            mask="dare",
            seed=seed,
        )
        merge(config, tmp_path / f"{seed}")
        vector, ours = task_vector(tiny_llama, tiny_llama_ft), weights(tiny_llama)
        expected = {}
        for name, delta in vector.items():
            mask = dare_mask(f"dare\0{seed}\0000\0{name}", 0, delta.numel(), 0.25)
            expected[name] = ours[name] + delta * mask.view(delta.shape) / 0.25
        assert_weights(tmp_path / f"{seed}", expected)
    again = merge(config, tmp_path / "again")
    one, two = ((p / "model.safetensors").read_bytes() for p in (again, tmp_path / "4"))
    assert one == two


def test_merge_impart_mask_is_the_codecs_at_that_density(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    config = MergeConfig(
        str(tiny_llama),
        models(tiny_llama_ft, mask_density=0.3),
        method="ta",
        mask="impart",
        seed=5,
    )
    merge(config, tmp_path / "out")
    vector, ours, found = (
        task_vector(tiny_llama, tiny_llama_ft),
        weights(tiny_llama),
        weights(tmp_path / "out"),
    )
    for name, delta in vector.items():
        expected = delta
        if delta.ndim == 2:
            m, n = delta.shape
            kept = round(0.3 * m * n / (m + n))
            assert abs(kept * (m + n) / (m * n) - 0.3) < 0.02
            codec = make_encoder("impart", beta=min(0.6, 1 - kept / min(m, n)))
            params = codec.fit((m, n), 0) | {"kept": kept}
            (term,) = codec.encode(name, TensorSource(delta.float()), params, seed=5)
            expected = term.to_dense().double()
        torch.testing.assert_close(found[name] - ours[name], expected, rtol=1e-3, atol=1e-5)


def test_merge_deltas_and_adapters_equal_their_full_models(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    options = Options(codec="lowrank", codec_options={"bits": 32}, ratio=3)
    compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", options)
    factors = lora(Q, 64, 64)
    lora_dir = adapter(tmp_path / "lora", factors)
    config = MergeConfig(
        str(tiny_llama), models(tmp_path / "delta", lora_dir, weight=0.5), method="ta"
    )
    merge(config, tmp_path / "out")
    expected = weights(tiny_llama)
    for delta in read_artifact(tmp_path / "delta").tensors:
        merged = delta.reconstruct(expected[delta.name].float()).double()
        expected[delta.name] = (expected[delta.name] + merged) / 2
    b, a = factors[f"{Q}.lora_B.weight"].double(), factors[f"{Q}.lora_A.weight"].double()
    expected[f"{Q}.weight"] += 0.5 * 2 * b @ a
    assert_weights(tmp_path / "out", expected)


def test_merge_delta_of_another_base_raises(
    tiny_llama: Path, tiny_llama_ft: Path, tiny_llama_ft2: Path, tmp_path: Path
) -> None:
    compress(tiny_llama_ft, tiny_llama_ft2, tmp_path / "delta", Options(codec="blockdiag", ratio=8))
    with pytest.raises(WrongBase):
        merge(MergeConfig(str(tiny_llama), models(tmp_path / "delta")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_added_vocabulary_of_one_model_is_taken_with_its_tokenizer(
    tiny_llama: Path, tiny_llama_ft: Path, tiny_llama_ft_vocab: Path, tmp_path: Path
) -> None:
    both = models(tiny_llama_ft, tiny_llama_ft_vocab, weight=0.5)
    out = merge(MergeConfig(str(tiny_llama), both, method="ta"), tmp_path / "out")
    found, theirs = weights(out), weights(tiny_llama_ft_vocab)
    assert torch.equal(found["lm_head.weight"][320:], theirs["lm_head.weight"][320:])
    assert AutoConfig.from_pretrained(out).vocab_size == 323
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("<extra_1>", add_special_tokens=False).input_ids == [321]
    AutoModelForCausalLM.from_pretrained(out)
    twice = models(tiny_llama_ft_vocab, tiny_llama_ft_vocab)
    with pytest.raises(UnsupportedTensor, match=r"embed_tokens\.weight: more than one"):
        merge(MergeConfig(str(tiny_llama), twice, method="ta"), tmp_path / "two")


def test_merge_dtype_shards_and_tokenizer_of_a_named_model(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    template = "{{ messages[0]['content'] }}"
    tuned = perturb(tiny_llama, tmp_path / "tuned", seed=9, chat_template=template)
    config = MergeConfig(
        str(tiny_llama),
        models(tiny_llama_ft, tuned),
        method="ta",
        dtype="bfloat16",
        tokenizer=str(tuned),
    )
    out = merge(config, tmp_path / "out", max_shard_bytes=60_000)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    with pytest.raises(OutputError, match="exists"):
        merge(config, out)
    with pytest.raises(InputError, match="tokenizer_source"):
        merge(
            MergeConfig(str(tiny_llama), models(tuned), tokenizer="x", method="ta"),
            tmp_path / "y",
        )


def test_merge_bfloat16_single_model_gives_it_back(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    tuned = perturb(base, tmp_path / "tuned", keep=("layers.1",))
    out = merge(MergeConfig(str(base), models(tuned), method="ta"), tmp_path / "out")
    found, theirs = (load_file(p / "model.safetensors") for p in (out, tuned))
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)


def test_merge_to_delta_equals_compressing_the_merged_model(
    tiny_llama: Path, tiny_llama_ft: Path, tiny_llama_ft2: Path, tmp_path: Path
) -> None:
    config = MergeConfig(str(tiny_llama), models(tiny_llama_ft, tiny_llama_ft2), method="ta")
    options = Options(codec="blockdiag", ratio=8)
    summary = merge_to_delta(config, tmp_path / "merged", options)
    assert summary.ratio == pytest.approx(8, rel=0.03)
    assert read_config(tmp_path / "merged").finetuned == "merged"
    full = merge(config, tmp_path / "full" / "merged")
    compress(tiny_llama, full, tmp_path / "delta", options)
    assert read_artifact(tmp_path / "delta").digest == summary.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "full", "merged"]


def test_command_yaml_and_flags_give_the_same_model(
    tiny_llama: Path, tiny_llama_ft: Path, tiny_llama_ft2: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(f"""
merge_method: dare_ties
base_model: {tiny_llama}
models:
  - model: {tiny_llama_ft}
    parameters: {{weight: 0.6, density: 0.5}}
  - model: {tiny_llama_ft2}
    parameters: {{weight: 0.4, density: 0.5}}
parameters: {{lambda: 1.2}}
""")
    code, stdout, stderr = impart("merge", tmp_path / "m.yaml", tmp_path / "a", "--seed", 3)
    assert (code, stderr) == (0, "")
    assert "written" in stdout
    arguments = ["--weight", 0.6, "--weight", 0.4, "--lambda", 1.2, "--density", 1]
    arguments += ["--mask", "dare", "--mask-density", 0.5, "--seed", 3]
    pair = (tiny_llama_ft, tiny_llama_ft2)
    assert impart("merge", tiny_llama, *pair, tmp_path / "b", *arguments)[0] == 0
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert one == two
    made = ["--delta", "--codec", "blockdiag", "--ratio", 8]
    code, stdout, _ = impart("merge", tmp_path / "m.yaml", tmp_path / "d", *made)
    assert code == 0
    assert read_artifact(tmp_path / "d").digest in stdout


def test_command_contradicting_flags_exit_2(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "m.yaml").write_text("{}")
    for arguments, message in {
        (tmp_path / "m.yaml", out, "--method", "ta"): "give method there",
        (tmp_path / "m.yaml", out): "merge_method",
        (tiny_llama, out): "nothing to merge",
        (tiny_llama, tiny_llama_ft, out, "--method", "ta", "--density", 0.5): "--mask-density",
        (tiny_llama, tiny_llama_ft, out, "--mask", "dare"): "mask_density",
        (tiny_llama, tiny_llama_ft, out, "--weight", 1, "--weight", 2): "2 values for 1 models",
        (tiny_llama, tiny_llama_ft, out, "--ratio", 8): "for --delta",
        (tiny_llama, tiny_llama_ft, out, "--method", "mean"): "method must be one of ta, ties",
    }.items():
        assert message in one_line_error("merge", *arguments)
    assert not out.exists()


def test_merge_mask_is_unbiased_over_seeds(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    """DARE's rescaled draw has the task vector as its mean."""
    name, seeds = "model.layers.0.mlp.up_proj.weight", 24
    vector = task_vector(tiny_llama, tiny_llama_ft)[name]
    total = torch.zeros_like(vector)
    for seed in range(seeds):
        mask = dare_mask(f"dare\0{seed}\0000\0{name}", 0, vector.numel(), 0.5)
        total += vector * mask.view(vector.shape) / 0.5
    off = float((total / seeds - vector).norm() / vector.norm())
    assert off == pytest.approx(math.sqrt(1 / seeds), rel=0.1)
