"""The ``impart`` command as users meet it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compressor.artifact.reader import read_artifact
from compressor.cli.app import app
from compressor.codecs import BlockDiagTerm
from tests.compressor.artifacts import write_as_version

STORED = sorted((Path(__file__).parents[1] / "artifact" / "data").iterdir())


def impart(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def one_line_error(*arguments: object) -> str:
    code, stdout, stderr = impart(*arguments)
    assert code == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("impart: error: ")
    return stderr


@pytest.fixture(scope="module")
def delta(tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "delta"
    code, stdout, stderr = impart(
        "compress", tiny_llama, tiny_llama_ft, out, "--codec", "blockdiag", "--ratio", 10
    )
    assert (code, stderr) == (0, "")
    n_bytes = sum(file.stat().st_size for file in out.iterdir())
    ratio = sum(file.stat().st_size for file in tiny_llama_ft.glob("*.safetensors")) / n_bytes
    assert f"{n_bytes:,} bytes, ratio {ratio:.2f}" in stdout
    assert ratio == pytest.approx(10, rel=0.02)
    return out


@pytest.fixture
def copy(delta: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for file in delta.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_inspect_json_adds_up(delta: Path, tiny_llama_ft: Path) -> None:
    code, stdout, _ = impart("inspect", delta, "--json")
    assert code == 0
    report = json.loads(stdout)
    n_bytes = sum(file.stat().st_size for file in delta.iterdir())
    tuned_bytes = (tiny_llama_ft / "model.safetensors").stat().st_size
    assert report["bytes"] == n_bytes == sum(report["files"].values())
    assert sum(report["groups"].values()) == n_bytes
    assert report["ratio"] == pytest.approx(tuned_bytes / n_bytes)
    assert report["codec"] == "blockdiag"
    assert report["digest"] == read_artifact(delta).digest
    assert report["base"]["identity"] == read_artifact(delta).config.base.identity
    assert report["relative_error"] > 0
    assert {"attention", "mlp", "embeddings", "lm_head", "norms and biases"} <= report[
        "groups"
    ].keys()


def test_inspect_table_names_every_group_and_tensor(delta: Path, tiny_llama_ft: Path) -> None:
    n_bytes = sum(file.stat().st_size for file in delta.iterdir())
    ratio = (tiny_llama_ft / "model.safetensors").stat().st_size / n_bytes
    code, stdout, _ = impart("inspect", delta, "--tensors")
    assert code == 0
    for text in (
        "base identity",
        f"{ratio:.2f}",
        "attention",
        "100.0%",
        "blockdiag bits 4",
        "n_blocks",
    ):
        assert text in stdout
    for entry in read_artifact(delta).config.tensors:
        assert entry.name in stdout


def test_verify_good_artifact_with_and_without_base(delta: Path, tiny_llama: Path) -> None:
    digest = read_artifact(delta).digest
    for extra in ([], ["--base", tiny_llama]):
        code, stdout, stderr = impart("verify", delta, *extra)
        assert (code, stderr) == (0, "")
        assert "ok" in stdout
        assert f"digest {digest}" in stdout


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_verify_and_inspect_of_every_stored_version_work(path: Path) -> None:
    for arguments in (("verify", path), ("inspect", "--tensors", path)):
        code, stdout, stderr = impart(*arguments)
        assert (code, stderr) == (0, "")
        assert stdout


@pytest.mark.parametrize("version", [1, 2])
def test_reconstruct_of_an_older_version_writes_the_same_model(
    delta: Path, tiny_llama: Path, tmp_path: Path, version: int
) -> None:
    write_as_version(delta, tmp_path / "old", version)
    terms = [term for d in read_artifact(delta).tensors for term in d.terms]
    assert any(isinstance(term, BlockDiagTerm) and term.in_columns for term in terms)
    for path, out in ((delta, "new-model"), (tmp_path / "old", "old-model")):
        assert impart("verify", path, "--base", tiny_llama)[0] == 0
        assert impart("reconstruct", tiny_llama, path, tmp_path / out)[0] == 0
    models = [load_file(tmp_path / out / "model.safetensors") for out in ("new-model", "old-model")]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert torch.equal(models[1][name], tensor), name


def test_verify_wrong_base_exits_2(delta: Path, tiny_llama_ft: Path, tiny_gpt2: Path) -> None:
    for other in (tiny_llama_ft, tiny_gpt2):
        assert "made for base" in one_line_error("verify", delta, "--base", other)


def test_verify_and_inspect_flipped_bit_exit_2(copy: Path) -> None:
    file = copy / "delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for command in ("verify", "inspect"):
        assert "delta.safetensors differs from its checksum" in one_line_error(command, copy)


def test_verify_missing_or_foreign_files_exit_2(copy: Path, tmp_path: Path) -> None:
    (copy / "extra.bin").write_bytes(b"x")
    assert "extra.bin" in one_line_error("verify", copy)
    (copy / "extra.bin").unlink()
    (copy / "delta_config.json").unlink()
    assert "delta_config.json" in one_line_error("verify", copy)
    assert "SHA256SUMS" in one_line_error("verify", tmp_path)
    assert "nowhere" in one_line_error("verify", tmp_path / "nowhere")


def test_reconstruct_writes_a_model(delta: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, stderr = impart("reconstruct", tiny_llama, delta, out, "--dtype", "bfloat16")
    assert (code, stderr) == (0, "")
    weights = load_file(out / "model.safetensors")
    base = load_file(tiny_llama / "model.safetensors")
    merged = {d.name: d.reconstruct(base[d.name]) for d in read_artifact(delta).tensors}
    assert all(torch.equal(weights[name], merged[name].bfloat16()) for name in merged)
    assert "exists" in one_line_error("reconstruct", tiny_llama, delta, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codec", "zip"], "unknown codec 'zip'"),
        (["--codec", "blockdiag", "--bits", "5"], "bits must be one of"),
        (["--max-kl", "0.1", "--bits", "4"], "auto chooses bits itself"),
        (["--codec", "impart", "--bits", "4"], "no option bits"),
        (["--codec", "blockdiag", "--head-fraction", "1.5"], "head_fraction"),
        (["--ratio", "0"], "ratio must be 1 or more"),
        (["--ratio", "100000"], "nearest possible"),
        (["--calibration", "/no/such/file"], "No such file"),
    ],
)
def test_compress_bad_option_exits_2_and_writes_nothing(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    error = one_line_error("compress", tiny_llama, tiny_llama_ft, tmp_path / "out", *options)
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_compress_every_codec_option_reaches_the_artifact(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    chosen = {
        "blockdiag": ["--bits", 3, "--head-fraction", 0.25, "--head-bits", 8],
        "impart": ["--beta", 0.5, "--c", 0.5, "--block-rows", 16],
        "lowrank": ["--bits", 8],
    }
    expected = {
        "blockdiag": {"bits": 3, "head_fraction": 0.25, "head_bits": 8},
        "impart": {"beta": 0.5, "C": 0.5, "block_rows": 16},
        "lowrank": {"bits": 8},
    }
    for codec, flags in chosen.items():
        out = tmp_path / codec
        code, _, stderr = impart(
            "compress", tiny_llama, tiny_llama_ft, out, "--codec", codec, "--ratio", 12, *flags
        )
        assert (code, stderr) == (0, "")
        config = read_artifact(out).config
        assert config.codec == codec
        assert expected[codec].items() <= config.options.items()


def test_compress_pickle_checkpoint_is_refused_with_the_remedy(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    error = one_line_error("compress", tiny_llama, tmp_path, tmp_path / "out")
    assert "pytorch_model.bin" in error
    assert "python -c" in error


def test_compress_adapter_becomes_a_lowrank_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    folder = tmp_path / "lora"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefix = f"base_model.model.{module}"
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    code, stdout, stderr = impart("compress", tiny_llama, folder, tmp_path / "delta")
    assert (code, stderr) == (0, "")
    assert "1 tensors" in stdout
    code, _, _ = impart("verify", tmp_path / "delta", "--base", tiny_llama)
    assert code == 0
    code, stdout, _ = impart("inspect", tmp_path / "delta", "--json")
    report = json.loads(stdout)
    assert report["codec"] == "lowrank"
    assert report["ratio_requested"] is None
    assert sum(report["groups"].values()) == report["bytes"]
    code, _, _ = impart("reconstruct", tiny_llama, tmp_path / "delta", tmp_path / "out")
    assert code == 0
    base = load_file(tiny_llama / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in base.items():
        if name == f"{module}.weight":
            expected = tensor + 2 * (b @ a)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found[name], tensor)


def test_help_lists_the_commands() -> None:
    code, stdout, _ = impart("--help")
    assert code == 0
    for command in ("compress", "inspect", "verify", "reconstruct"):
        assert command in stdout
    assert impart("--version")[1].startswith("impart-serve ")
    assert impart("compress")[0] == 2


def test_console_script_in_a_process_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compressor", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("impart: error: no SHA256SUMS")
    assert done.stderr.count("\n") == 1


def test_compress_without_codec_is_auto(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    code, stdout, stderr = impart(
        "compress", tiny_llama, tiny_llama_ft, tmp_path / "out", "--ratio", 8
    )
    assert code == 0, stderr
    assert "auto chose" in stdout
    config = json.loads((tmp_path / "out" / "delta_config.json").read_text())
    assert config["options"]["auto"]["tried"]


def test_certify_and_inspect_show_what_compress_has_recorded(
    delta: Path, copy: Path, tiny_llama: Path, tiny_llama_ft: Path
) -> None:
    shown = impart("inspect", delta, "--json")[1]
    recorded = json.loads(shown)["certificate"]
    assert (recorded["n_prompts"], recorded["texts"]) == (8, "built-in")
    assert json.loads(shown)["groups"]["certificate"] < 8192
    line = f"8 prompts from built-in texts, {recorded['n_tokens']} tokens"
    assert line in impart("inspect", delta)[1]
    assert line in impart("verify", delta)[1]
    old = read_artifact(copy).digest
    prompts = copy.parent / "own.txt"
    prompts.write_text("The quick brown fox jumps over the lazy dog\n")
    code, stdout, _ = impart("certify", tiny_llama, tiny_llama_ft, copy, "--prompts", prompts)
    assert code == 0
    assert "1 prompts from own texts" in stdout
    assert f"digest {read_artifact(copy).digest} (it was {old})" in stdout
