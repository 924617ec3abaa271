"""One forward pass: batch -> logits."""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.batch import Batch
from server.engine.model import BaseModel


class Runner:
    """Owns the base model during a step."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run the model on packed tokens; return logits ``[R, V]`` for `batch.logit_rows`."""
        base = self.base
        base.context.rows, base.context.output_rows = batch.rows, batch.output_rows
        base.context.merged_slot = batch.merged_slot
        base.store.plan = batch.attention
        try:
            output = base.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logit_rows,
            )
        finally:
            base.context.rows = base.context.output_rows = base.context.merged_slot = None
            base.store.plan = None
        logits: Tensor = output.logits
        return logits[0]
