"""Tiny models shared by the whole run; each is made once, on first use, and never written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Triton's kernels run on the CPU here; triton reads this once, when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.tiny import Kind, make_tiny, perturb


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the session's tiny models."""
    return tmp_path_factory.mktemp("tiny")


def _base(folder: Path, kind: Kind) -> Path:
    return make_tiny(kind, folder / kind, seed=3)


def _finetune(base: Path, *, seed: int = 4, name: str = "ft") -> Path:
    return perturb(base, base.parent / f"{base.name}-{name}", seed=seed, scale=0.1)


@pytest.fixture(scope="session")
def tiny_llama(tiny_dir: Path) -> Path:
    """Llama: grouped-query attention, untied, BOS prepended."""
    return _base(tiny_dir, "llama")


@pytest.fixture(scope="session")
def tiny_llama_ft(tiny_llama: Path) -> Path:
    """Full fine-tune of `tiny_llama`."""
    return _finetune(tiny_llama)


@pytest.fixture(scope="session")
def tiny_llama_ft2(tiny_llama: Path) -> Path:
    """Another full fine-tune of `tiny_llama`."""
    return _finetune(tiny_llama, seed=5, name="ft2")


@pytest.fixture(scope="session")
def tiny_llama_ft_vocab(tiny_llama: Path) -> Path:
    """Fine-tune of `tiny_llama` with three added tokens and its own chat template."""
    return perturb(
        tiny_llama,
        tiny_llama.parent / "llama-ft-vocab",
        seed=6,
        extra_vocab=3,
        chat_template="{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
    )


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_dir: Path) -> Path:
    """Qwen2: biases on q, k, v."""
    return _base(tiny_dir, "qwen2")


@pytest.fixture(scope="session")
def tiny_qwen2_ft(tiny_qwen2: Path) -> Path:
    """Full fine-tune of `tiny_qwen2`."""
    return _finetune(tiny_qwen2)


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_dir: Path) -> Path:
    """Qwen3: norms on q and k."""
    return _base(tiny_dir, "qwen3")


@pytest.fixture(scope="session")
def tiny_qwen3_ft(tiny_qwen3: Path) -> Path:
    """Full fine-tune of `tiny_qwen3`."""
    return _finetune(tiny_qwen3)


@pytest.fixture(scope="session")
def tiny_mistral(tiny_dir: Path) -> Path:
    """Mistral, without a sliding window."""
    return _base(tiny_dir, "mistral")


@pytest.fixture(scope="session")
def tiny_mistral_ft(tiny_mistral: Path) -> Path:
    """Full fine-tune of `tiny_mistral`."""
    return _finetune(tiny_mistral)


@pytest.fixture(scope="session")
def tiny_gemma(tiny_dir: Path) -> Path:
    """Gemma: tied embedding, scaled; norms multiply by 1 + weight."""
    return _base(tiny_dir, "gemma")


@pytest.fixture(scope="session")
def tiny_gemma_ft(tiny_gemma: Path) -> Path:
    """Full fine-tune of `tiny_gemma`."""
    return _finetune(tiny_gemma)


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_dir: Path) -> Path:
    """GPT-2: Conv1D stores [in, out], one fused q-k-v, learned positions, biases, tied."""
    return _base(tiny_dir, "gpt2")


@pytest.fixture(scope="session")
def tiny_gpt2_ft(tiny_gpt2: Path) -> Path:
    """Full fine-tune of `tiny_gpt2`."""
    return _finetune(tiny_gpt2)
