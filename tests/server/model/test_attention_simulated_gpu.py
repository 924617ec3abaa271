"""The same forms of attention on a simulated GPU: Triton, graphs, steps launched ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.server.conftest import Served
from tests.server.engine.test_llm_engine_simulated_gpu import (
    ask_all,
    assert_truth,
    greedy,
    on_gpu,
)
from tests.server.model.test_attention import KINDS, bases  # noqa: F401
from tests.server.model.test_sinks import sinking  # noqa: F401

PROMPT = list(range(5, 27))  # longer than every window and chunk
LIMITS = {"max_batch_tokens": 16, "kv_block_tokens": 4, "max_num_seqs": 4}


@pytest.mark.slow
def test_sinks_of_several_variants_in_a_graph(sinking: Served) -> None:  # noqa: F811
    for name in sinking.checkpoints:
        sinking.truth(name, PROMPT)
    with on_gpu():
        answers, stats = ask_all(sinking, greedy(4), PROMPT, **LIMITS)
    assert_truth(sinking, answers, PROMPT, 4)
    assert stats.n_static_steps > 0
    assert stats.n_eager_decode_steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_other_forms_equal_generate(
    bases: Callable[[Any], Served],  # noqa: F811
    kind: str,
) -> None:
    served = bases(kind)
    served.truth("base", PROMPT)
    with on_gpu():
        answers, stats = ask_all(served, greedy(4), PROMPT, **LIMITS)
    assert_truth(served, answers, PROMPT, 4)
    assert stats.n_static_steps > 0
    assert stats.n_eager_decode_steps == 0
