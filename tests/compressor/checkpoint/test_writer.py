"""A finite weight is never written as infinity, whatever the command and the dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.writer import narrowed
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError
from tests.compressor.cli.test_app import impart, one_line_error
from tests.compressor.peft.test_adapter import EMBED, adapter, imported

NORM = "model.norm.weight"


def test_narrowed_raises_exactly_where_numpy_makes_an_infinity() -> None:
    around = [65503.9, 65504.0, 65519.9, 65520.0, 65521.0, 3.3e38, 3.4e38, 0.0, 1e-30]
    for value in (*around, *(-value for value in around)):
        x = torch.tensor([1.0, value])
        with np.errstate(over="ignore"):
            beyond = bool(np.isinf(x.numpy().astype(np.float16)).any())
        if not beyond:
            assert torch.equal(narrowed(x, torch.float16, "w"), x.half())
            continue
        with pytest.raises(InputError, match=r"w: the value .* write bfloat16 or float32"):
            narrowed(x, torch.float16, "w")
    with pytest.raises(InputError, match=r"value -3\.4e\+38 .* bfloat16 can hold .* write float32"):
        narrowed(torch.tensor([1.0, -3.4e38]), torch.bfloat16, "w")


def test_narrowed_keeps_infinities_that_were_there() -> None:
    x = torch.tensor([float("inf"), float("nan"), -float("inf"), 2.0])
    assert torch.equal(narrowed(x, torch.float16, "w").float().nan_to_num(7), x.nan_to_num(7))
    assert narrowed(torch.empty(0, 3), torch.float16, "w").shape == (0, 3)


@pytest.fixture(scope="module")
def large(tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, fine-tune and delta of which one norm has a value beyond float16's."""
    tmp_path = tmp_path_factory.mktemp("large")
    for name, model in (("base", tiny_llama), ("tuned", tiny_llama_ft)):
        folder = Path(shutil.copytree(model, tmp_path / name))
        tensors = load_file(folder / "model.safetensors")
        tensors[NORM][3] = 7e4
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = Options(codec="blockdiag", ratio=8)
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", options)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "reconstruct BASE DELTA OUT --dtype float16",
        "export BASE DELTA OUT --to hf --dtype float16",
        "export BASE DELTA OUT --to mergekit --dtype float16",
        "export BASE DELTA OUT --to peft --modules all --dtype float16",
        "merge BASE TUNED OUT --method ta --dtype float16",
        "merge BASE DELTA OUT --method ties --dtype float16",
        "merge RECIPE OUT",
    ],
)
def test_value_beyond_the_dtype_is_refused_with_the_remedy(
    large: Path, tmp_path: Path, command: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {large / 'base'}\nout_dtype: float16\n"
        f"models:\n  - model: {large / 'tuned'}\n    parameters:\n      weight: 1.0\n"
    )
    for name in ("BASE", "TUNED", "DELTA"):
        command = command.replace(name, str(large / name.lower()))
    command = command.replace("RECIPE", str(recipe)).replace("OUT", str(tmp_path / "out"))
    error = one_line_error(*command.split(), "--quiet")
    assert f"{NORM}: the value 7000" in error
    assert "write bfloat16 or float32" in error
    assert not (tmp_path / "out").exists()
    recipe.write_text(recipe.read_text().replace("float16", "bfloat16"))
    assert impart(*command.replace("float16", "bfloat16").split(), "--quiet")[0] == 0
    (file,) = (tmp_path / "out").glob("*model.safetensors")
    assert all(bool(t.isfinite().all()) for t in load_file(file).values())


def test_added_rows_of_an_adapter_beyond_float16_raise(tiny_llama: Path, tmp_path: Path) -> None:
    base = load_file(tiny_llama / "model.safetensors")[f"{EMBED}.weight"].half()
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors") | {f"{EMBED}.weight": base}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    factors = {f"{EMBED}.lora_embedding_A": torch.ones(4, 321)}
    factors[f"{EMBED}.lora_embedding_B"] = torch.full((64, 4), 1e4)
    factors[f"{EMBED}.base_layer.weight"] = torch.cat([base, torch.ones(1, 64).half()])
    with pytest.raises(InputError, match=r"embed_tokens\.weight: the value 80001 is beyond"):
        imported(folder, adapter(tmp_path / "lora", factors))
