"""What a CUDA graph must not contain, found without a GPU: waiting for the device, copies to it.

The kernels are left out (their launches are capturable by nature), everything around them runs:
the model definition of transformers, our layers, slot arrays, embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.compress.options import Options
from server.deltas import reader
from server.ops.attention import AttentionCall
from server.ops.kernels import TorchKernels
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import RowMapping, SlotSegments
from tests.server.conftest import PAIR
from tests.server.engine.step.test_static_step_parity import HELD
from tests.server.model.test_base import PROMPTS
from tests.simulated_cuda.graphs import check_capturable

COPIES = {"aten::lift_fresh"}  # torch.tensor(...): a copy from pageable memory


class CaptureRules(TorchDispatchMode):
    """Raises on operations that a capturing stream does not allow."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        check_capturable(function, args)
        if function._schema.name in COPIES:
            raise AssertionError(f"{function._schema.name} cannot be captured")
        return function(*args, **(kwargs or {}))


@contextmanager
def capture_rules() -> Iterator[None]:
    """With `CaptureRules`, and without `tolist`, which no operation shows on a CPU."""

    def refuse(_: Tensor) -> None:
        raise AssertionError("tolist cannot be captured")

    with mock.patch.object(Tensor, "tolist", refuse), CaptureRules():
        yield


class NoBlocks:
    """Adds nothing."""

    def add_(self, *_: object) -> None: ...


class NoKernels(TorchKernels):
    """Torch's, with nothing where Triton's would launch and torch's ask for the rows."""

    def blockdiag(self, blocks: PackedBlocks) -> Any:
        return NoBlocks()

    def lowrank_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Any
    ) -> None:
        self._look(rows.by_slot())

    impart_add_ = lowrank_add_

    @staticmethod
    def _look(segments: SlotSegments) -> None:
        assert segments.count is None or segments.count.shape == (1,)

    def rotate_and_write_(self, call: AttentionCall) -> None: ...

    def decode_(self, out: Tensor, call: AttentionCall) -> None:
        out.copy_(call.q)

    def prefill_(self, out: Tensor, call: AttentionCall) -> None:
        out.copy_(call.q)


@pytest.mark.parametrize(
    ("kind", "codecs", "options"),
    [("llama", HELD, {"tied": True}), ("llama", HELD, {}), ("qwen3", PAIR, {})],
)
def test_static_step_does_nothing_that_a_graph_cannot_hold(
    served: Any,
    harness: Any,
    kind: str,
    codecs: dict[str, Options],
    options: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # These kernels add nothing, which the trial of a variant's terms would notice.
    monkeypatch.setattr(reader, "VariantTrial", lambda: lambda delta, staged: None)
    pair = served(kind, codecs, **options)
    engine = harness(pair, static=True, kernels=NoKernels())
    step = engine.core._runner._static
    forward, seen = step._forward, []

    def guarded(batch: Any, with_deltas: bool) -> Tensor:
        seen.append(with_deltas)
        with capture_rules():
            return forward(batch, with_deltas)

    step._forward = guarded
    alone = [[name] for name in pair.checkpoints]  # in the bucket of one row
    for names in (*alone, list(pair.checkpoints)):
        sent = [engine.submit(name, PROMPTS[2], max_tokens=4) for name in names]
        engine.run(*sent)
        assert [one.error for one in sent] == [None] * len(sent), "see the log"
    assert set(seen) == {False, True}


def test_rules_notice_what_they_are_for() -> None:
    x = torch.arange(4)
    for wrong in (
        lambda: x.max().item(),
        lambda: x[x > 1],
        lambda: torch.tensor([1]),
        lambda: x.tolist(),
    ):
        with pytest.raises(AssertionError, match="cannot be captured"), capture_rules():
            wrong()
