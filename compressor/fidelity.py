"""How far a compressed fine-tune is from the real one: KL per token and top-1 agreement.

Weight error ranks compression methods wrongly (bias hurts far more than noise); what the model
says does not. Both models run in memory over the user's calibration texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import Checkpoint
from compressor.codecs import TensorDelta
from compressor.errors import CheckpointError, InputError, UnsupportedTensor
from compressor.layout import read_layout

BATCH_TOKENS = 1024  # of padded input; bounds the logits in memory
MAX_TEXT_TOKENS = 512

_FLOAT32_LIMIT = 2_000_000_000  # parameters; larger models run in the dtype they are stored in
_DIGITS = 5  # significant; what is beyond depends on the machine's thread count


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over every predicted token of every text.

    kl_per_token    KL(fine-tune || compressed) in nats
    top1_agreement  how often both find the same token most likely
    """

    kl_per_token: float
    top1_agreement: float
    n_tokens: int
    n_texts: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    base: Checkpoint, tuned: Path, deltas: Iterable[TensorDelta], texts: Sequence[str]
) -> Fidelity:
    """Load the fine-tune twice, replace one's weights by ``base + delta``, and compare them."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tuned, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{tuned}: --calibration needs the fine-tune's tokenizer, which cannot be loaded"
        ) from error
    reference, candidate = load_model(tuned), load_model(tuned)
    merge_into(candidate, base, deltas)
    return compare(reference, candidate, encode_texts(tokenizer, texts))


def load_model(path: Path) -> Any:
    """Load a causal language model for evaluation: GPU if there is one, float32 unless large."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=False)
    if model.num_parameters() <= _FLOAT32_LIMIT:
        model.to(torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def merge_into(model: Any, base: Checkpoint, deltas: Iterable[TensorDelta]) -> None:
    """Replace the changed parameters of `model` by ``base + delta``, rounded to the model's dtype.

    model  a Hugging Face causal language model with the fine-tune's shapes; parameters without
           a delta are left as they are
    """
    keys = read_layout(base.path).keys(base.tensors, base.name)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for delta in deltas:
            if delta.name not in parameters:
                raise UnsupportedTensor(
                    f"{delta.name}: KL cannot be measured here, because transformers keeps this "
                    "tensor inside a larger one; compress with no calibration text"
                )
            stored = base.rows(keys[delta.name])
            merged = delta.merge(stored.T if delta.transposed else stored)
            parameters[delta.name].copy_(merged.T if delta.transposed else merged)


def encode_texts(
    tokenizer: Any, texts: Sequence[str], max_tokens: int = MAX_TEXT_TOKENS
) -> list[list[int]]:
    """Token ids of each text, cut at `max_tokens`; texts of one token predict nothing."""
    encoded = [list(tokenizer(text).input_ids[:max_tokens]) for text in texts]
    kept = [ids for ids in encoded if len(ids) > 1]
    if not kept:
        raise InputError("the calibration texts are too short: no text has two tokens")
    return kept


def compare(reference: Any, candidate: Any, samples: Sequence[Sequence[int]]) -> Fidelity:
    """Run both models over the token ids; means over all predicted positions."""
    kl, agreed, n_tokens = 0.0, 0, 0
    width = min(reference.get_input_embeddings().num_embeddings, candidate.config.vocab_size)
    for ids, mask in _batches(samples, reference.device):
        predicted = mask[:, 1:].bool()
        p = _logits(reference, ids, mask)[predicted][:, :width]
        q = _logits(candidate, ids, mask)[predicted][:, :width]
        kl += float(kl_per_token(p, q).double().sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        n_tokens += len(p)
    return Fidelity(
        kl_per_token=float(f"{kl / n_tokens:.{_DIGITS}g}"),
        top1_agreement=float(f"{agreed / n_tokens:.{_DIGITS}g}"),
        n_tokens=n_tokens,
        n_texts=len(samples),
    )


def kl_per_token(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return ``KL(p || q)`` in nats: float logits ``[T, V]`` twice -> float32 ``[T]``."""
    p = p_logits.float().log_softmax(-1)
    q = q_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1]


def _batches(
    samples: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, mask) ``[B, T]`` of texts of like length, padded on the right."""
    waiting: list[Sequence[int]] = []
    for ids in sorted(samples, key=len):
        if waiting and len(ids) * (len(waiting) + 1) > BATCH_TOKENS:
            yield _padded(waiting, device)
            waiting = []
        waiting.append(ids)
    if waiting:
        yield _padded(waiting, device)


def _padded(batch: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(list(tokens))
        mask[row, : len(tokens)] = 1
    return ids.to(device), mask.to(device)
