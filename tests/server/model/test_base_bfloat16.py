"""The engine in bfloat16, as it serves: its own kernels, mixed batches, chunked prefill.

Two roundings may choose differently between nearly equal tokens, so each token is judged by what a
float32 model of the reconstructed weights thinks of it.
"""

from __future__ import annotations

import pytest
import torch

from tests.server.conftest import PAIR
from tests.server.helpers import Recorded
from tests.server.model.test_base import PROMPTS

N_TOKENS = 8
TOLERANCE = 0.1  # of the spread of the logits; rounding gives .05, with torch's products too


def worst_regret(recorded: Recorded, model: torch.nn.Module) -> float:
    """How far a chosen token's logit ever is below the best, in standard deviations of logits."""
    tokens = recorded.request.tokens
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, len(recorded.request.prompt_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(recorded.output_ids)[:, None])[:, 0]
    return float(((logits.max(1).values - chosen) / logits.std(1)).max())


@pytest.mark.parametrize("max_batch_tokens", [7, 256])
def test_engine_bfloat16_tokens_are_the_best_but_for_rounding(
    served, harness, max_batch_tokens: int
) -> None:
    pair = served("llama", PAIR)
    engine = harness(pair, dtype="bfloat16", max_batch_tokens=max_batch_tokens)
    sent = {
        (name, i): engine.submit(name, prompt, max_tokens=N_TOKENS, ignore_eos=True)
        for i, prompt in enumerate(PROMPTS)
        for name in pair.checkpoints
    }
    engine.run(*sent.values())
    engine.assert_idle()
    for (name, i), recorded in sent.items():
        assert recorded.error is None
        assert len(recorded.output_ids) == N_TOKENS
        assert worst_regret(recorded, pair.oracle(name)) < TOLERANCE, (name, i)
