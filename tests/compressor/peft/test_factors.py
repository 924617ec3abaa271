"""Every kind of adapter that the installed PEFT makes: exact against its own merge, or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.artifact.reader import read_config
from compressor.checkpoint.files import Checkpoint
from compressor.errors import UnsupportedTensor
from compressor.peft.adapter import Adapter
from compressor.peft.config import ACCEPTED
from tests.compressor.cli.test_app import impart, one_line_error
from tests.tiny import make_tiny

Bases = dict[str, Path]
ALL = ["q_proj", "v_proj", "down_proj"]


def lora(**settings: Any) -> peft.LoraConfig:
    given = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return peft.LoraConfig(**(given | settings))


def lokr(**settings: Any) -> peft.LoKrConfig:
    return peft.LoKrConfig(**({"target_modules": ALL, "r": 8, "alpha": 6} | settings))


def ia3(**settings: Any) -> peft.IA3Config:
    given = {"target_modules": ALL, "feedforward_modules": ["down_proj"]}
    return peft.IA3Config(**(given | settings))


ALPHA = {"q_proj": 3}

# Name -> base, configuration. Tied bases: what PEFT keeps tied.
KINDS: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "lora": ("llama", lambda: lora(target_modules=ALL)),
    "lora all linear": ("qwen2", lambda: lora(target_modules="all-linear")),
    "lora of Conv1D": ("gpt2", lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "rank-stabilised": ("llama", lambda: lora(use_rslora=True)),
    "patterns": (
        "llama",
        lambda: lora(
            target_modules=ALL,
            rank_pattern={"down_proj": 2, r"layers\.1\..*v_proj": 3},
            alpha_pattern={"q_proj": 3},
        ),
    ),
    "some layers": ("llama", lambda: lora(layers_to_transform=[1])),
    "orthogonal start": ("llama", lambda: lora(init_lora_weights="orthogonal")),
    "gaussian start": ("llama", lambda: lora(init_lora_weights="gaussian")),
    "DoRA": ("llama", lambda: lora(use_dora=True, target_modules=ALL)),
    "lm_head": ("llama", lambda: lora(target_modules=["lm_head"])),
    "embedding": ("llama", lambda: lora(target_modules=["embed_tokens", "q_proj"])),
    "embedding and lm_head": ("llama", lambda: lora(target_modules=["embed_tokens", "lm_head"])),
    "saved head": ("llama", lambda: lora(modules_to_save=["lm_head"])),
    "saved embedding and norm": (
        "llama",
        lambda: lora(modules_to_save=["embed_tokens", "model.norm"]),
    ),
    "bias of factors": ("qwen2", lambda: lora(lora_bias=True)),
    "biases of adapted layers": ("qwen2", lambda: lora(bias="lora_only")),
    "all biases": ("qwen2", lambda: lora(bias="all")),
    "bias of factors and trained biases": ("qwen2", lambda: lora(lora_bias=True, bias="all")),
    "tokens": ("llama", lambda: lora(trainable_token_indices=[3, 11, 300])),
    "neighbouring tokens": ("llama", lambda: lora(trainable_token_indices=[318, 316, 317])),
    "tokens of both": (
        "llama",
        lambda: lora(trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}),
    ),
    "tied: tokens": ("tied", lambda: lora(trainable_token_indices=[3, 11, 300])),
    "tied: tokens, tied": (
        "tied",
        lambda: lora(trainable_token_indices=[3, 11], ensure_weight_tying=True),
    ),
    "tied: saved embedding, tied": (
        "tied",
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "trainable tokens": (
        "llama",
        lambda: peft.TrainableTokensConfig(token_indices=[3, 300], target_modules=["embed_tokens"]),
    ),
    "tied: trainable tokens": (
        "tied",
        lambda: peft.TrainableTokensConfig(token_indices=[3, 300], target_modules=["embed_tokens"]),
    ),
    "AdaLoRA": (
        "llama",
        lambda: peft.AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules=ALL, init_r=5, lora_alpha=8, total_step=10
        ),
    ),
    "VeRA": (
        "llama",
        lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4),
    ),
    "LoHa": (
        "llama",
        lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=ALL, r=3, alpha=8),
    ),
    "LoKr": ("llama", lambda: lokr()),
    "LoKr of a whole and a product": ("llama", lambda: lokr(r=2)),
    "LoKr of two products": ("llama", lambda: lokr(r=2, decompose_both=True, decompose_factor=8)),
    "LoKr of a product and a whole": (
        "llama",
        lambda: lokr(r=3, decompose_both=True, decompose_factor=2, target_modules=["q_proj"]),
    ),
    "LoKr patterns": ("llama", lambda: lokr(r=2, rank_pattern={"v_proj": 1}, alpha_pattern=ALPHA)),
    "IA3": ("qwen2", lambda: ia3()),
    "IA3 of Conv1D": (
        "gpt2",
        lambda: ia3(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "PiSSA": ("llama", lambda: lora(init_lora_weights="pissa", target_modules=ALL)),
    "PiSSA of Conv1D": (
        "gpt2",
        lambda: lora(init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "OLoRA": (
        "llama",
        lambda: lora(init_lora_weights="olora", target_modules=ALL, rank_pattern={"v_proj": 2}),
    ),
    "norms": ("llama", lambda: peft.LNTuningConfig(task_type="CAUSAL_LM")),
}
UNTYING = {
    "lm_head": lambda: lora(target_modules=["lm_head", "q_proj"]),
    "embedding": lambda: lora(target_modules=["embed_tokens"]),
    "embedding and lm_head": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "DoRA of lm_head": lambda: lora(target_modules=["lm_head"], use_dora=True),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
    "saved embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved both": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens of both": lambda: lora(
        trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}
    ),
}


@pytest.fixture(scope="module")
def bases(
    tiny_llama: Path, tiny_qwen2: Path, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bases:
    tied = make_tiny("llama", tmp_path_factory.mktemp("tied") / "base", seed=1, tied=True)
    return {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2, "tied": tied}


def trained(base: Path, config: peft.PeftConfig, out: Path) -> Path:
    """An adapter all of whose parameters have moved, as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(out)
    return out


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The weights that PEFT itself makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def ours(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Base and deltas; of a tied pair under both names."""
    weights = load_file(base / "model.safetensors")
    with Checkpoint(base) as checkpoint, Adapter(adapter) as opened:
        for delta in opened.deltas(checkpoint):
            weight = weights[delta.name]
            found = delta.reconstruct(weight.T if delta.transposed else weight)
            weights[delta.name] = found.T if delta.transposed else found
    if "lm_head.weight" not in weights:
        embedding = "model.embed_tokens.weight"
        weights["lm_head.weight"] = weights[
            embedding if embedding in weights else "transformer.wte.weight"
        ]
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_kind_equals_pefts_own_merge(bases: Bases, tmp_path: Path, kind: str) -> None:
    name, config = KINDS[kind]
    adapter = trained(bases[name], config(), tmp_path / "adapter")
    expected, found = merged(bases[name], adapter), ours(bases[name], adapter)
    before = load_file(bases[name] / "model.safetensors")
    assert any(not torch.equal(found[key], tensor) for key, tensor in before.items())
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].float(), tensor, rtol=1e-5, atol=1e-5, msg=key)


def test_pissa_saved_as_a_plain_lora_equals_what_was_trained(bases: Bases, tmp_path: Path) -> None:
    """The form that PEFT converts to when it is told where the adapter began."""
    config = lora(init_lora_weights="pissa", target_modules=ALL)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape) * parameter.requires_grad
    first = str(tmp_path / "first")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=first)
    expected = model.merge_and_unload().state_dict()
    found = ours(bases["llama"], tmp_path / "adapter")
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


def test_factors_larger_than_the_matrix_become_its_value(bases: Bases, tmp_path: Path) -> None:
    for rank in (2, 8):
        adapter = trained(bases["llama"], lokr(r=rank), tmp_path / str(rank))
        with Checkpoint(bases["llama"]) as checkpoint, Adapter(adapter) as opened:
            deltas = list(opened.deltas(checkpoint))
        assert any(delta.exact is None for delta in deltas) == (rank == 2)
        for delta in deltas:
            m, n = delta.shape
            n_bytes = sum(part.nbytes for term in delta.terms for part in term.tensors().values())
            n_bytes += delta.exact.values.nbytes if delta.exact is not None else 0
            assert 0 < n_bytes <= 4 * m * n


def test_ia3_without_exact_is_sampled_with_its_error_said(bases: Bases, tmp_path: Path) -> None:
    adapter = trained(bases["qwen2"], ia3(), tmp_path / "adapter")
    code, said, _ = impart("import", bases["qwen2"], adapter, tmp_path / "delta", "--ratio", 4)
    assert code == 0
    assert "relative error of the difference" in said
    entries = {entry.name: entry for entry in read_config(tmp_path / "delta").tensors}
    weights = [entry for name, entry in entries.items() if name.endswith("weight")]
    assert all(entry.terms[0].codec == "blockdiag" and entry.error for entry in weights)
    assert all(len(entry.terms) == 1 for entry in weights)
    biases = {name for name in entries if name.endswith("bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "v_proj"}


def test_adalora_with_components_removed_equals_pefts_own_merge(
    bases: Bases, tmp_path: Path
) -> None:
    adapter = trained(bases["llama"], KINDS["AdaLoRA"][1](), tmp_path / "adapter")
    file, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    left = [True, False, True, True, False]
    config["rank_pattern"] = {}
    for key in [key for key in tensors if key.endswith("lora_E")]:
        module = key.removesuffix(".lora_E")
        config["rank_pattern"][f"{module.removeprefix('base_model.model.')}.lora_E"] = left
        for part in ("lora_E", "lora_A"):
            tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][left].contiguous()
        tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, left].contiguous()
    save_file(tensors, file, {"format": "pt"})
    settings.write_text(json.dumps(config))
    expected, found = merged(bases["llama"], adapter), ours(bases["llama"], adapter)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


def test_tied_embedding_equals_pefts_own_forward(bases: Bases, tmp_path: Path) -> None:
    """Not its merge, which adds the difference to the one tied tensor once for either module."""
    config = lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    adapter = trained(bases["tied"], config, tmp_path / "adapter")
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(bases["tied"])
        found = model(ids).logits
        expected = peft.PeftModel.from_pretrained(model, adapter)(ids).logits
        assert not torch.allclose(found, expected, atol=0.1)
        model = AutoModelForCausalLM.from_pretrained(bases["tied"])
        weights = ours(bases["tied"], adapter)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", UNTYING)
def test_kind_that_unties_equals_pefts_own_forward_once_reconstructed(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    """By logits, for PEFT's merge leaves the two tied in memory or not as it happens."""
    base = bases["tied"]
    adapter = trained(base, UNTYING[kind](), tmp_path / "adapter")
    assert impart("import", base, adapter, tmp_path / "delta", "--exact")[0] == 0
    assert read_config(tmp_path / "delta").base.untied == ("lm_head.weight",)
    assert impart("verify", tmp_path / "delta", "--base", base)[0] == 0
    assert impart("reconstruct", base, tmp_path / "delta", tmp_path / "full")[0] == 0
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(ids).logits
        model = AutoModelForCausalLM.from_pretrained(base)
        expected = peft.PeftModel.from_pretrained(model, adapter)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_merge_refuses_an_adapter_that_unties(bases: Bases, tmp_path: Path) -> None:
    adapter = trained(bases["tied"], UNTYING["lm_head"](), tmp_path / "adapter")
    error = one_line_error("merge", bases["tied"], adapter, tmp_path / "out")
    assert "lm_head.weight is tied in the base and has values of its own" in error


@pytest.mark.parametrize("kind", sorted(kind.value for kind in peft.PeftType))
def test_every_other_kind_of_peft_is_refused_by_name_with_a_way_out(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (tmp_path / "adapter_model.safetensors").touch()
    if kind in ACCEPTED:
        assert any(config().peft_type == kind for _, config in KINDS.values())
        return
    with pytest.raises(UnsupportedTensor, match=rf"peft_type {kind} is not supported") as refused:
        Adapter(tmp_path)
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    merges = not issubclass(config, peft.PromptLearningConfig)
    merges = merges and kind not in ("ADAPTION_PROMPT", "XLORA", "POLY")
    assert ("merge_and_unload" if merges else "train one of LORA") in str(refused.value)


def test_vera_without_its_projections_and_bias_without_a_place_are_refused(
    bases: Bases, tmp_path: Path
) -> None:
    config = peft.VeraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, save_projection=False
    )
    with pytest.raises(UnsupportedTensor, match="save_projection must be on"):
        ours(bases["llama"], trained(bases["llama"], config, tmp_path / "vera"))
    adapter = trained(bases["qwen2"], lora(lora_bias=True), tmp_path / "bias")
    with pytest.raises(UnsupportedTensor, match="lora_bias adds a bias to a layer that has none"):
        ours(bases["llama"], adapter)
