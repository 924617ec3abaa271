"""Import of LoRA adapters against PEFT's own formulas, written out densely in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.files import Checkpoint
from compressor.codecs import TensorDelta
from compressor.errors import CheckpointError, UnsupportedTensor
from compressor.peft.adapter import Adapter
from compressor.peft.config import is_adapter

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBED = "model.embed_tokens"


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    prefixed = {f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    return folder


def lora(module: str, out: int, inp: int, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, inp, generator=generator),
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def imported(base: Path, folder: Path) -> dict[str, TensorDelta]:
    with Checkpoint(base) as checkpoint, Adapter(folder) as opened:
        return {delta.name: delta for delta in opened.deltas(checkpoint)}


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    return b.double() @ a.double()


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the rounding of a float32 product."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def dense(delta: TensorDelta) -> torch.Tensor:
    (term,) = delta.terms
    return term.to_dense().double()


def test_deltas_patterns_and_plain_scaling_equal_the_formula(
    tiny_llama: Path, tmp_path: Path
) -> None:
    tensors = lora(Q, 64, 64) | lora(DOWN, 64, 112, rank=2, seed=1)
    folder = adapter(
        tmp_path / "a", tensors, rank_pattern={"down_proj": 2}, alpha_pattern={r".*1\.mlp\..*": 6}
    )
    assert is_adapter(folder)
    assert not is_adapter(tiny_llama)
    deltas = imported(tiny_llama, folder)
    assert list(deltas) == [f"{Q}.weight", f"{DOWN}.weight"]
    assert_equal(dense(deltas[f"{Q}.weight"]), product(tensors, Q) * 2)
    assert_equal(dense(deltas[f"{DOWN}.weight"]), product(tensors, DOWN) * 3)


def test_deltas_rank_stabilised_scaling_is_alpha_over_root(
    tiny_llama: Path, tmp_path: Path
) -> None:
    tensors = lora(Q, 64, 64, rank=3)
    folder = adapter(tmp_path / "a", tensors, r=3, use_rslora=True)
    expected = product(tensors, Q) * (8 / math.sqrt(3))
    found = dense(imported(tiny_llama, folder)[f"{Q}.weight"])
    assert_equal(found, expected)


def test_deltas_conv1d_is_turned_to_out_in(tiny_gpt2: Path, tmp_path: Path) -> None:
    module = "transformer.h.1.attn.c_attn"
    tensors = lora(module, 192, 64)
    folder = adapter(tmp_path / "a", tensors, fan_in_fan_out=True)
    delta = imported(tiny_gpt2, folder)[f"{module}.weight"]
    assert delta.transposed
    assert_equal(dense(delta), product(tensors, module) * 2)


def test_deltas_embedding_factors_are_transposed(tiny_llama: Path, tmp_path: Path) -> None:
    a, b = torch.randn(4, 320), torch.randn(64, 4)
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    delta = imported(tiny_llama, adapter(tmp_path / "a", tensors))[f"{EMBED}.weight"]
    assert_equal(dense(delta), (b.double() @ a.double()).T * 2)


def test_deltas_bfloat16_factors_are_exact_in_16_bits(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = {k: t.bfloat16() for k, t in lora(Q, 64, 64).items()}
    (term,) = imported(tiny_llama, adapter(tmp_path / "a", tensors))[f"{Q}.weight"].terms
    assert term.params()["bits"] == 16
    assert torch.equal(term.a, tensors[f"{Q}.lora_A.weight"].float())
    full = adapter(tmp_path / "b", lora(Q, 64, 64))
    (term,) = imported(tiny_llama, full)[f"{Q}.weight"].terms
    assert term.params()["bits"] == 32


def test_deltas_modules_saved_whole_are_exact_from_the_first_changed_row(
    tiny_llama: Path, tmp_path: Path
) -> None:
    base = load_file(tiny_llama / "model.safetensors")
    embed = torch.cat([base[f"{EMBED}.weight"], torch.randn(2, 64)])
    embed[317] += 1
    norm = base["model.norm.weight"] + 1
    tensors = {f"{EMBED}.weight": embed, "model.norm.modules_to_save.weight": norm}
    tensors["model.layers.0.input_layernorm.weight"] = base["model.layers.0.input_layernorm.weight"]
    deltas = imported(tiny_llama, adapter(tmp_path / "a", tensors))
    assert list(deltas) == [f"{EMBED}.weight", "model.norm.weight"]
    grown = deltas[f"{EMBED}.weight"]
    assert (grown.shape, grown.base_shape, grown.terms) == ((322, 64), (320, 64), ())
    assert grown.exact is not None
    assert grown.exact.row_start == 317
    assert torch.equal(grown.reconstruct(base[f"{EMBED}.weight"]), embed)
    assert torch.equal(deltas["model.norm.weight"].reconstruct(base["model.norm.weight"]), norm)


def test_deltas_untrained_factors_are_skipped(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = lora(Q, 64, 64)
    tensors[f"{Q}.lora_B.weight"].zero_()
    assert imported(tiny_llama, adapter(tmp_path / "a", tensors)) == {}


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "OFT"},
        {"use_qalora": True},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "olora", "use_dora": True},
    ],
)
def test_open_unsupported_adapter_raises_unsupported(tmp_path: Path, config: Any) -> None:
    folder = adapter(tmp_path / "a", lora(Q, 64, 64), **config)
    with pytest.raises(UnsupportedTensor, match="merge_and_unload"):
        Adapter(folder)


def test_open_pickled_adapter_raises_checkpoint_error(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", lora(Q, 64, 64))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        Adapter(folder)


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"),
    [
        (lora(Q, 64, 64, rank=2), {}, CheckpointError, "rank 4, the factors have 2"),
        (lora(Q, 64, 60), {}, CheckpointError, "do not fit"),
        (lora("model.layers.9.mlp.up_proj", 4, 4), {}, UnsupportedTensor, r"layers\.9"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64)}, {}, UnsupportedTensor, "one pair"),
        (
            lora(Q, 64, 64) | {f"{Q}.lora_magnitude_vector": torch.ones(64)},
            {},
            UnsupportedTensor,
            "magnitude",
        ),
        (lora(Q, 64, 64), {"alpha_pattern": {"(": 1}}, CheckpointError, "pattern"),
    ],
)
def test_deltas_misfit_raises_naming_the_module(
    tiny_llama: Path,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(error, match=message):
        imported(tiny_llama, folder)


def test_deltas_base_weight_saved_under_the_factors_is_checked_and_dropped(
    tiny_llama: Path, tmp_path: Path
) -> None:
    head = load_file(tiny_llama / "model.safetensors")["lm_head.weight"]
    tensors = lora("lm_head", 320, 64) | {"lm_head.base_layer.weight": head}
    tensors["lm_head.original_module.weight"] = torch.zeros(3)  # never looked at
    delta = imported(tiny_llama, adapter(tmp_path / "a", tensors))["lm_head.weight"]
    assert delta.exact is None
    assert_equal(dense(delta), product(tensors, "lm_head") * 2)
    tensors["lm_head.base_layer.weight"] = head + 1
    with pytest.raises(UnsupportedTensor, match="not the base's"):
        imported(tiny_llama, adapter(tmp_path / "b", tensors))


def test_deltas_resized_embedding_with_factors_has_exact_added_rows(
    tiny_llama: Path, tmp_path: Path
) -> None:
    base = load_file(tiny_llama / "model.safetensors")[f"{EMBED}.weight"]
    under = torch.cat([base, torch.randn(3, 64)])
    a, b = torch.randn(4, 323), torch.randn(64, 4)
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    tensors[f"{EMBED}.base_layer.weight"] = under
    delta = imported(tiny_llama, adapter(tmp_path / "a", tensors))[f"{EMBED}.weight"]
    assert (delta.shape, delta.base_shape) == ((323, 64), (320, 64))
    expected = under.double() + (b.double() @ a.double()).T * 2
    assert_equal(delta.reconstruct(base).double(), expected)
    del tensors[f"{EMBED}.base_layer.weight"]
    with pytest.raises(CheckpointError, match="do not fit"):
        imported(tiny_llama, adapter(tmp_path / "b", tensors))


def test_deltas_of_tied_modules_are_one_if_they_are_the_same_and_else_two(
    tiny_gemma: Path, tmp_path: Path
) -> None:
    tied = load_file(tiny_gemma / "model.safetensors")[f"{EMBED}.weight"]
    names = {f"{EMBED}.weight", "lm_head.weight"}
    a, b = tied.T[:4].contiguous(), tied[:64, :4].contiguous()
    apart: list[tuple[dict[str, torch.Tensor], set[str]]] = [
        (lora("lm_head", 320, 64), {"lm_head.weight"}),
        ({f"{EMBED}.weight": tied + 1}, {f"{EMBED}.weight"}),
        ({f"{EMBED}.weight": tied + 1, "lm_head.weight": tied + 2}, names),
        ({f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}, {f"{EMBED}.weight"}),
    ]
    for number, (tensors, changed) in enumerate(apart):
        folder = adapter(tmp_path / str(number), tensors)
        assert imported(tiny_gemma, folder).keys() == changed
        with Checkpoint(tiny_gemma) as base, Adapter(folder) as opened:
            assert opened.layout(base).borrowed == {"lm_head.weight": f"{EMBED}.weight"}
    same = {f"{EMBED}.weight": tied + 1, "lm_head.weight": tied + 1}
    both = adapter(tmp_path / "both", same)
    assert list(imported(tiny_gemma, both)) == [f"{EMBED}.weight"]
    with Checkpoint(tiny_gemma) as base, Adapter(both) as opened:
        assert opened.layout(base).borrowed == {}
