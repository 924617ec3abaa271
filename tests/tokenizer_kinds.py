"""Small tokenizers of the kinds that models bring, built with the `tokenizers` library.

byte-level     GPT-2, Llama 3, Qwen: every byte has a letter
llama          Llama 2, Mistral, Phi-3: "▁" for a space, bytes for what is unknown; the first
               space of a text is not shown
gemma          the same, the first space shown
metaspace      the same with the Metaspace decoder
unigram        T5, ALBERT: no bytes, an unknown token
wordpiece      BERT: "##" for what goes on, punctuation without its space
bpe-suffix     "</w>" where a word ends
mixed          byte-level, and something done to the text after it
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from tests.tiny import BOS, CORPUS, EOS, PAD, SPECIAL, make_tokenizer

TEXTS = (*CORPUS, "I like 😊 and 火星 naïve €5", "é 🎉! x", "  two  spaces ", "a.b, c? d's")
WITH_BYTES = ("llama", "gemma", "metaspace")
KINDS = ("byte-level", *WITH_BYTES, "unigram", "wordpiece", "bpe-suffix", "mixed")
UNKNOWN = "<unk>"


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return the tokenizer of a kind; not to be changed."""
    if kind == "byte-level":
        return make_tokenizer(400).backend_tokenizer
    if kind == "mixed":
        made = make_tokenizer(400).backend_tokenizer
        made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("~", "-")])
        return made
    if kind in WITH_BYTES:
        return _with_byte_fallback(kind)
    return {"unigram": _unigram, "wordpiece": _wordpiece, "bpe-suffix": _bpe_suffix}[kind]()


def _with_byte_fallback(kind: str) -> Tokenizer:
    names = [UNKNOWN, *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE(unk_token=UNKNOWN))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    model = models.BPE(
        learnt["vocab"], merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(model)
    made.add_special_tokens([UNKNOWN, *SPECIAL])
    made.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    parts: list[decoders.Decoder] = [decoders.ByteFallback()]
    if kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        parts.append(decoders.Metaspace(prepend_scheme="first", split=False))
    else:
        space = normalizers.Replace(" ", "▁")
        prepend = [normalizers.Prepend("▁")] if kind == "llama" else []
        made.normalizer = normalizers.Sequence([*prepend, space])
        parts = [decoders.Replace("▁", " "), *parts, decoders.Fuse()]
        parts += [decoders.Strip(" ", 1, 0)] if kind == "llama" else []
    made.decoder = decoders.Sequence(parts)
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[UNKNOWN, *SPECIAL], unk_token=UNKNOWN, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=[UNKNOWN, PAD, BOS, EOS], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def _bpe_suffix() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=[UNKNOWN, *SPECIAL],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made
