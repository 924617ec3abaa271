from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compressor.artifact.reader import read_artifact
from compressor.compress.certify import add_certificate
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError, WrongBase
from compressor.export.reconstruct import reconstruct


def test_compress_certificate_counts_in_the_size_that_was_asked_for(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    made = {}
    for certificate in (False, True):
        out = tmp_path / str(certificate)
        made[certificate] = compress(
            tiny_llama, tiny_llama_ft, out, Options(ratio=8, certificate=certificate)
        )
        assert read_artifact(out).n_bytes == made[certificate].n_bytes
    assert made[True].ratio == pytest.approx(8, rel=0.02)
    assert made[True].ratio >= 8
    assert (tmp_path / "True" / "certificate.json").stat().st_size < 8192


def test_certify_adds_what_compress_would_have_recorded_and_nothing_else(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    delta = tmp_path / "delta"
    before = compress(tiny_llama, tiny_llama_ft, delta, Options(ratio=8))
    tensors = (delta / "delta.safetensors").read_bytes()
    assert f"| tensors | {before.n_tensors} stored" in (delta / "README.md").read_text("utf-8")
    plain = read_artifact(delta)
    assert plain.certificate is None
    found = add_certificate(tiny_llama, tiny_llama_ft, delta)
    after = read_artifact(delta, base_identity=plain.config.base.identity)
    assert (found.old_digest, found.digest) == (before.digest, after.digest)
    assert found.digest != found.old_digest
    assert after.certificate == found.certificate
    assert (delta / "delta.safetensors").read_bytes() == tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]
    assert f"{after.n_bytes - (delta / 'README.md').stat().st_size:,} bytes" in (
        delta / "README.md"
    ).read_text("utf-8")
    card = (delta / "README.md").read_text("utf-8")
    assert f"{len(after.tensors)} stored" in card
    again = add_certificate(tiny_llama, tiny_llama_ft, delta)
    assert again.digest == found.digest


def test_certify_of_another_base_is_refused_and_changes_nothing(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    delta = tmp_path / "delta"
    digest = compress(tiny_llama, tiny_llama_ft, delta, Options(ratio=8)).digest
    with pytest.raises(WrongBase):
        add_certificate(tiny_llama_ft, tiny_llama_ft, delta)
    assert read_artifact(delta).digest == digest


def test_compress_without_a_tokenizer_says_that_there_is_no_certificate(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama_ft, bare)
    for file in bare.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    summary = compress(tiny_llama, bare, tmp_path / "delta", Options(ratio=8, certificate=True))
    assert any("no certificate" in note and "tokenizer" in note for note in summary.notes)
    assert read_artifact(tmp_path / "delta").certificate is None
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox\n")
    options = Options(ratio=8, certificate=True, certificate_prompts=prompts)
    with pytest.raises(InputError, match="--certificate-prompts"):
        compress(tiny_llama, bare, tmp_path / "other", options)


def test_compress_own_prompts_are_in_the_certificate_and_a_model_made_of_it_has_none(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The quick brown", "completion": " fox"}\n')
    options = Options(ratio=8, certificate=True, certificate_prompts=prompts)
    compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", options)
    certificate = read_artifact(tmp_path / "delta").certificate
    assert certificate is not None
    assert (certificate.texts, len(certificate.prompts)) == ("own", 1)
    reconstruct(tiny_llama, tmp_path / "delta", tmp_path / "made")
    assert not (tmp_path / "made" / "certificate.json").exists()
