"""One model in memory whose weights are the fine-tune's, the base's or a variant's, by tensor.

Whatever is compared runs through the same module: only the tensors that differ are copied in, from
the checkpoints on disk and from a delta.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import read_layout
from compressor.checkpoint.parameter import storable_shape
from compressor.codecs import TensorDelta
from compressor.errors import CheckpointError, WrongShape
from compressor.measure.comparison import padded
from compressor.measure.fidelity import equal_twins, load_model, stored_tensors_of
from compressor.measure.samples import Sample

Weights = Literal["finetuned", "base", "variant"]

_LOGITS_AT_ONCE = 1 << 24  # elements
_TOLERANCE = 1e-2  # of logits, in any dtype a model is evaluated in


class _Given(nn.Module):
    """Stands in for the decoder: returns hidden states that are already known.

    kind  the type of what the decoder returns
    """

    hidden: Tensor
    kind: type

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.kind(last_hidden_state=self.hidden)


class Head:
    """All of a causal language model but its decoder: hidden states to logits.

    owns_weights  keep a copy of the output embedding, which the model's own changes leave alone
    """

    def __init__(self, model: Any, *, owns_weights: bool) -> None:
        self._given = _Given()
        self._module = copy.copy(model)
        children = dict(model._modules)
        output = model.get_output_embeddings()
        names = [name for name, child in children.items() if child is output]
        if len(names) != 1 or model.base_model_prefix not in children:
            raise CheckpointError(
                f"{type(model).__name__}: decoder and output layer cannot be told apart, so this "
                "architecture cannot be evaluated"
            )
        children[model.base_model_prefix] = self._given
        if owns_weights:
            children[names[0]] = copy.deepcopy(output)
        self._module._modules = children
        self._chunk = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)

    def logits(self, hidden: Tensor, kind: type) -> Iterator[Tensor]:
        """Yield float32 logits ``[t, V]`` of ``hidden [T, H]``, some tokens at a time.

        kind  the type of the decoder's output
        """
        self._given.kind = kind
        for part in torch.split(hidden, self._chunk):
            self._given.hidden = part.unsqueeze(0)
            ids = torch.zeros(1, len(part), dtype=torch.int64, device=part.device)
            yield self._module(input_ids=ids, use_cache=False).logits[0].float()


class SwappedModel:
    """A fine-tune's model, with any of its tensors exchanged for the base's or a variant's.

    names       of all parameters, tied ones once
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self._base, self._tuned = base, tuned
        layout, tuned_layout = read_layout(base.path), read_layout(tuned.path)
        if tied := sorted(set(tuned_layout.tied) - set(layout.tied)):
            raise CheckpointError(
                f"{tied[0][0]} is tied in the fine-tune and not in the base, so that no model here "
                "holds what a delta gives both"
            )
        self._tuned_keys = tuned_layout.keys(tuned.tensors, tuned.name)
        self._model = load_model(tuned.path)
        needed = dict(self._model.named_parameters()).keys() | self._tuned_keys.keys()
        self._parameters: dict[str, Tensor] = {
            name: tensor
            for name, tensor in stored_tensors_of(self._model).items()
            if name in needed  # a buffer may be left out
        }
        layout = layout.with_untied(self._parameters.keys())
        self._base_keys = layout.keys(base.tensors, base.name)
        self._twins = equal_twins(layout, self._parameters)
        self._now: dict[str, Weights] = {}
        self._deltas: Mapping[str, TensorDelta] = {}
        if missing := sorted(self._parameters.keys() - self._base_keys.keys()):
            raise CheckpointError(f"{base.name}: tensor {missing[0]} of the fine-tune is missing")
        self.names = tuple(self._parameters)
        self._tuned_head = Head(self._model, owns_weights=True)
        self._head = Head(self._model, owns_weights=False)
        self._output_kind: type = type(None)

    @property
    def module(self) -> Any:
        """The Hugging Face model, with the weights that were chosen last."""
        return self._model

    def set_variant(self, deltas: Mapping[str, TensorDelta]) -> None:
        """Choose what ``variant`` weights are, by name; the model returns to the fine-tune's.

        A delta is asked for when its tensor is next to be the variant's, and not kept: a mapping
        may read it from disk. Raises WrongShape for a name that the fine-tune does not have.
        """
        self.use({})
        if foreign := sorted(deltas.keys() - self._parameters.keys()):
            raise WrongShape(
                f"{foreign[0]}: {self._tuned.name} has no such tensor; the delta was made for "
                "another fine-tune"
            )
        self._deltas = deltas

    def use(self, chosen: Mapping[str, Weights]) -> bool:
        """Give each named parameter the chosen weights and all others the fine-tune's.

        Returns whether any value differs from what the fine-tune has there.
        """
        differs = False
        for name in self.names:
            wanted = chosen.get(name, "finetuned")
            if self._now.get(name, "finetuned") == wanted:
                differs |= wanted != "finetuned"
                continue
            parameter = self._parameters[name]
            with torch.no_grad():
                tuned = self._tuned.read_stored(self._tuned_keys[name])
                parameter.copy_(tuned)
                if wanted != "finetuned":
                    before = parameter.clone()
                    self._overwrite(name, parameter, wanted)
                    differs |= not torch.equal(before, parameter)
            self._now[name] = wanted
        return differs

    def _overwrite(self, name: str, parameter: Tensor, wanted: Weights) -> None:
        """Rows that the base lacks (added vocabulary) stay the fine-tune's under ``base``."""
        stored = self._base.read_stored(self._base_keys[name])
        delta = None
        if wanted == "variant":
            delta = self._deltas.get(self._twins.get(name, name))
        if delta is not None:
            shape = delta.shape[::-1] if delta.transposed else delta.shape
            if storable_shape(tuple(parameter.shape)) != shape:
                raise WrongShape(
                    f"{name}: the delta gives shape {list(shape)}, {self._tuned.name} has "
                    f"{list(parameter.shape)}; it was made for another fine-tune"
                )
            merged = delta.applied_to_stored(stored)
            stored = merged.reshape(len(merged), *parameter.shape[1:]) if stored.ndim else merged[0]
        if stored.ndim != parameter.ndim or stored.shape[1:] != parameter.shape[1:]:
            raise WrongShape(
                f"{name}: {self._base.name} has shape {list(stored.shape)}, the fine-tune "
                f"{list(parameter.shape)}"
            )
        parameter[: stored.shape[0]].copy_(stored) if stored.ndim else parameter.copy_(stored)

    def hidden(self, samples: Sequence[Sample]) -> Tensor:
        """Return the decoder's output ``[N, H]`` that predicts each counted token, in order."""
        ids, mask, wanted = padded(samples)
        device = self._model.device
        decoder = getattr(self._model, self._model.base_model_prefix)
        output = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        self._output_kind = type(output)
        found: Tensor = output.last_hidden_state[wanted.to(device)]
        return found

    def logits(self, hidden: Tensor, *, finetuned: bool = False) -> Iterator[Tensor]:
        """Yield float32 logits ``[t, V]`` of what `hidden` returned, some tokens at a time.

        finetuned  with the fine-tune's output layer, whatever weights the model has now
        """
        head = self._tuned_head if finetuned else self._head
        return head.logits(hidden, self._output_kind)

    def log_probs(self, samples: Sequence[Sample]) -> Iterator[Tensor]:
        """Yield float32 log-probabilities ``[t, V]`` with the weights the model has now."""
        for logits in self.logits(self.hidden(samples)):
            yield logits.log_softmax(-1)

    def check_head(self, sample: Sample) -> None:
        """Check that decoder and head, run apart, are the model; CheckpointError if not."""
        ids = torch.tensor([sample.ids], device=self._model.device)
        whole = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        expected = whole[torch.tensor(sample.counted[1:], device=whole.device)]
        apart = torch.cat(list(self.logits(self.hidden([sample]))))
        if not torch.allclose(apart, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise CheckpointError(
                f"{type(self._model).__name__}: its output layer needs more than the decoder's "
                "output, so this architecture cannot be evaluated"
            )
