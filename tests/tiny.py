"""Tiny random models of real architectures, with real tokenizers, made offline in milliseconds.

The weights are scaled so that greedy text varies from prompt to prompt and the best logit leads
by much more than float32 rounding: a test that compares two implementations token for token then
tests the implementations, not ties.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Kind = Literal["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2"]
KINDS: tuple[Kind, ...] = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")

# Small sizes for any configuration class that has these fields.
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, POSITIONS = 64, 2, 4, 2, 16, 112, 512
TIED_BY_DEFAULT: frozenset[Kind] = frozenset({"gemma", "gpt2"})
PREPENDS_BOS: frozenset[Kind] = frozenset({"llama", "mistral", "gemma"})

PAD, BOS, EOS = "<pad>", "<s>", "<|endoftext|>"  # a name Qwen2's tokenizer class insists on
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, BOS, EOS, TURN, TURN_END)
MIN_VOCAB = 256 + len(SPECIAL)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not (continue_final_message is defined and continue_final_message and loop.last) %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog while the bank opens a new account for you.",
    "I would like to book a table for four people at seven in the evening, please.",
    "Classify the request: my card has not arrived and the transfer is still pending.",
    "def add(left, right): return left + right  # the sum of the two numbers",
    'Extract the details as JSON: {"time": "19:00", "people": "4", "name": "Smith"}',
)


def make_tiny(
    kind: Kind,
    path: Path,
    *,
    seed: int = 0,
    tied: bool | None = None,
    vocab_size: int = 320,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    chat_template: str | None = CHAT_TEMPLATE,
    **config: Any,
) -> Path:
    """Write a random model of architecture `kind` with its tokenizer to `path`; return `path`.

    tied            share embedding and lm_head; default: what the architecture usually does
    vocab_size      rows of the embedding; at least 261 (bytes and special tokens)
    max_shard_size  for example ``"40KB"`` for a checkpoint of several files
    config          further fields of the architecture's config, for example ``num_hidden_layers``
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB}, got {vocab_size}")
    tokenizer = make_tokenizer(vocab_size, bos=kind in PREPENDS_BOS, chat_template=chat_template)
    tie = kind in TIED_BY_DEFAULT if tied is None else tied
    fields = _architecture(kind) | {
        "vocab_size": vocab_size,
        "tie_word_embeddings": tie,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_config = AutoConfig.for_model(kind, **(fields | config))
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    _initialise(model, torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(path)
    return path


def perturb(
    base_dir: Path,
    out: Path,
    *,
    seed: int = 1,
    scale: float = 0.1,
    rank: int | None = None,
    extra_vocab: int = 0,
    keep: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    max_shard_size: str = "50GB",
    chat_template: str | None = None,
) -> Path:
    """Write a full fine-tune of `base_dir` to `out`: every parameter moves; return `out`.

    scale         standard deviation of each change relative to that of its parameter
    rank          make the changes of matrices of this rank instead of full rank
    extra_vocab   add so many tokens ``<extra_0>`` ... and their embedding rows
    keep          parameters whose name contains one of these stay exactly as they are
    dtype         default: the base's
    chat_template  replace the base's
    """
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto")
    stored = model.dtype
    model.to(torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    generator = torch.Generator().manual_seed(seed)
    if extra_vocab:
        tokenizer.add_tokens([f"<extra_{i}>" for i in range(extra_vocab)])
        rows = model.config.vocab_size + extra_vocab
        model.resize_token_embeddings(rows, mean_resizing=False)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in keep):
                parameter += _change(parameter, scale, rank, generator)
    model.to(dtype or stored).save_pretrained(out, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(out)
    return out


def make_tokenizer(
    vocab_size: int = 320, *, bos: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer: any text encodes, and decodes to itself.

    bos  prepend the BOS token when special tokens are added, as Llama's tokenizer does
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, inner.token_to_id(BOS))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _architecture(kind: Kind) -> dict[str, Any]:
    if kind == "gpt2":
        return {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
        }
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": POSITIONS,
    }
    if kind == "mistral":
        fields["sliding_window"] = None
    return fields


def _initialise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Random weights of useful size: unit activations, logits with a spread of several units."""
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_start(name, noise, tied, model.config.model_type == "gemma"))
    model.tie_weights()


def _start(name: str, noise: Tensor, tied: bool, is_gemma: bool) -> Tensor:
    if noise.dim() == 1:
        centre = 1.0 if "norm" in name or ".ln_" in name else 0.0
        # Gemma multiplies by 1 + weight, and its embedding is small: the last norm makes the
        # logits large enough.
        if is_gemma:
            centre = 5.0 if name == "model.norm.weight" else 0.0
        return (0.0 if name.endswith("bias") else centre) + 0.1 * noise
    if "embed_tokens" in name or "wte" in name:
        # Gemma multiplies embeddings by sqrt(hidden). A tied table is also the lm_head; kept
        # small beside the layers' outputs, so that a token does not just predict itself.
        return noise * (HIDDEN**-0.5 if is_gemma else 0.3 if tied else 1.0)
    if "wpe" in name:
        return noise * 0.3
    if "lm_head" in name:
        return noise * (1.0 if is_gemma else 4.0) * noise.shape[1] ** -0.5
    fan_in = noise.shape[0] if ".c_" in name else noise.shape[1]  # Conv1D stores [in, out]
    gain = 3.0 if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")) else 1.5
    return noise * gain * fan_in**-0.5


def _change(
    parameter: Tensor, scale: float, rank: int | None, generator: torch.Generator
) -> Tensor:
    if parameter.dim() == 1:
        return scale * 0.1 * torch.randn(parameter.shape, generator=generator)
    spread = scale * parameter.std()
    if rank is None:
        return spread * torch.randn(parameter.shape, generator=generator)
    left = torch.randn(parameter.shape[0], rank, generator=generator)
    right = torch.randn(rank, parameter.shape[1], generator=generator)
    return spread * rank**-0.5 * (left @ right)
