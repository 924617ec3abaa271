"""The engine with Triton's kernels over static buffers, interpreted: what a graph replays.

Padding rows are there (a bucket has more rows than the step) and their cache page is NaN.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from server.ops.triton.kernels import TritonKernels
from tests.server.engine.test_static_parity import HELD

N_TOKENS = 3


@pytest.mark.slow  # half a minute: every launch is interpreted
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("blockdiag", "head", "impart", "lowrank", "rows")), ("qwen3", ("blockdiag",))],
)
def test_static_steps_of_every_delta_kernel_equal_generate(
    served, harness, kind: str, names: tuple[str, ...]
) -> None:
    pair = served(kind, {name: HELD[name] for name in names}, num_hidden_layers=1)
    engine = harness(pair, static=True, kernels=TritonKernels(torch.device("cpu")))
    sent = {name: engine.submit(name, "x", max_tokens=N_TOKENS) for name in pair.checkpoints}
    for _ in range(100):  # of turns, some of which wait for the loader: the clock tells nothing
        if all(recorded.done for recorded in sent.values()):
            break
        engine.core.turn()
    engine.assert_idle()
    for name, recorded in sent.items():
        assert recorded.error is None
        want = pair.truth(name, recorded.request.prompt_ids)[:N_TOKENS]
        assert recorded.output_ids == want, name
    counts = engine.core._runner.counts
    assert counts.static >= N_TOKENS - 1
    assert counts.eager == 0
