"""How far a compressed fine-tune is from the real one: KL per token and top-1 agreement.

Weight error ranks compression methods wrongly (bias hurts far more than noise); what the model
says does not. Both models run in memory over the user's calibration texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.dense_model import load_causal_lm
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import Layout, read_layout
from compressor.codecs import TensorDelta
from compressor.errors import CheckpointError, InputError, UnsupportedTensor
from compressor.measure.comparison import Comparer, SampleBatch, padded
from compressor.measure.samples import Sample, load_tokenizer
from compressor.measure.texts import MAX_TEXT_TOKENS

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
    base: Checkpoint,
    tuned: Path,
    deltas: Iterable[TensorDelta],
    texts: Sequence[str],
    unchanged: Collection[str] = (),
) -> Fidelity:
    """Load the fine-tune twice, replace one's weights by ``base + delta``, and compare them.

    unchanged  parameters without a delta that the base has other values for all the same
    """
    tokenizer = load_tokenizer(tuned, "--calibration")
    reference, candidate = load_model(tuned), load_model(tuned)
    merge_into(candidate, base, deltas, unchanged)
    return compare(reference, candidate, encode_texts(tokenizer, texts))


def load_model(path: Path) -> Any:
    """Load a causal language model for evaluation: GPU if there is one, float32 unless large."""
    try:
        model = load_causal_lm(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or name a --codec and give no texts") from error
    if model.num_parameters() <= _FLOAT32_LIMIT:
        model.to(torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def stored_tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that checkpoints hold, by name."""
    stored = model.state_dict()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in stored}
    return dict(model.named_parameters()) | buffers


def equal_twins(layout: Layout, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Aliases that the base has tied and the model has not, though both have the same values: a
    delta has one entry for the two. With the other's name.
    """
    return {
        alias: target
        for alias, target in layout.borrowed.items()
        if torch.equal(parameters[alias], parameters[target])
    }


def merge_into(
    model: Any,
    base: Checkpoint,
    deltas: Iterable[TensorDelta],
    unchanged: Collection[str] = (),
) -> None:
    """Replace the changed parameters of `model` by ``base + delta``, rounded to the model's dtype.

    model      a Hugging Face causal language model with the fine-tune's shapes
    unchanged  parameters without a delta that become the base's; others are left as they are
    """
    parameters = stored_tensors_of(model)
    layout = read_layout(base.path).with_untied(parameters.keys())
    keys = layout.keys(base.tensors, base.name)
    twins = equal_twins(layout, parameters)

    def replace(name: str, delta: TensorDelta | None) -> None:
        if name not in parameters:
            raise UnsupportedTensor(
                f"{name}: KL cannot be measured here, because transformers keeps this "
                "tensor inside a larger one; compress with no calibration text"
            )
        stored = base.read_stored(keys[name])
        merged = stored if delta is None else delta.applied_to_stored(stored)
        parameters[name].copy_(merged.reshape(parameters[name].shape))

    with torch.no_grad():
        for delta in deltas:
            replace(delta.name, delta)
        for name in unchanged:
            replace(name, None)
        for alias, target in twins.items():
            parameters[alias].copy_(parameters[target])


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
    texts = [Sample(tuple(ids), (True,) * len(ids)) for ids in samples]
    comparer = Comparer(texts, lambda batch: [_log_probs(reference, batch)])
    found = comparer.compare(comparer.outputs_of(lambda batch: [_log_probs(candidate, batch)]))
    return Fidelity(
        kl_per_token=float(f"{found.kl.mean:.{_DIGITS}g}"),
        top1_agreement=float(f"{found.top1_agreement.mean:.{_DIGITS}g}"),
        n_tokens=comparer.n_tokens,
        n_texts=len(samples),
    )


def _log_probs(model: Any, batch: SampleBatch) -> Tensor:
    ids, mask, wanted = (tensor.to(model.device) for tensor in padded(batch.samples))
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[wanted].float().log_softmax(-1)
