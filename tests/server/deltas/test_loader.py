"""What arrives late must be invisible until it is whole: an uploader that stops half way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from server.deltas import loader
from server.deltas.loads import LoadCopied, LoaderMessage, LoadFailed
from server.deltas.upload import Ready, Transfer, Upload
from tests.server.conftest import ALL_CODECS, Served
from tests.server.helpers import CoreHarness

PROMPT = "The quick brown fox"


class HalfUpload(Upload):
    """Half of the tensors have arrived; the others do once the gate opens and somebody waits."""

    def __init__(self, late: Sequence[Transfer], gate: threading.Event) -> None:
        super().__init__()
        self._late, self._gate = late, gate

    def done(self) -> bool:
        return self._gate.is_set()

    def wait(self) -> None:
        assert self._gate.wait(60)
        for target, source in self._late:
            target.copy_(source)


class SlowUploader:
    """Writes every other tensor at once, NaN into the rest until the gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.marks: list[Ready] = []
        self.awaited: list[Ready | None] = []

    def ready(self) -> Ready:
        self.marks.append(Ready())
        return self.marks[-1]

    def abandon(self) -> None: ...

    def copy(self, transfers: Sequence[Transfer], after: Ready | None = None) -> Upload:
        self.awaited.append(after)
        for target, source in transfers[::2]:
            target.copy_(source)
        for target, _ in transfers[1::2]:
            target.fill_(float("nan") if target.is_floating_point() else 0xA5 % 128)
        self.begun.set()
        return HalfUpload(transfers[1::2], self.gate)


def test_slot_half_uploaded_is_never_seen_by_a_step(
    served: Callable[..., Served], harness: Callable[..., CoreHarness]
) -> None:
    many = served("llama", ALL_CODECS)
    engine = harness(many)
    names = ["base", "blockdiag"]
    first = [engine.submit(name, PROMPT) for name in names]
    engine.run(*first)
    slow = SlowUploader()
    engine.core.loader._uploader = slow
    late = engine.submit("other-blocks", PROMPT)
    engine.until(slow.begun.is_set)
    others = [
        engine.submit(name, [*r.request.prompt_ids, 7])
        for name, r in zip(names, first, strict=True)
    ]
    engine.run(*others)  # serving goes on beside the copy
    assert not late.done
    assert late.output_ids == []
    slow.gate.set()
    engine.run(late)
    engine.assert_idle()
    assert slow.awaited == slow.marks, "a copy must come after the room was made"
    for recorded, name in zip(
        [*first, *others, late], [*names, *names, "other-blocks"], strict=True
    ):
        assert recorded.error is None
        want = many.truth(name, recorded.request.prompt_ids)
        assert recorded.output_ids == want[: len(recorded.output_ids)]
        assert recorded.output_ids


def test_added_rows_of_a_reconstructed_variant_take_the_same_way(
    served: Callable[..., Served], harness: Callable[..., CoreHarness]
) -> None:
    pair = served("llama", {"blockdiag": ALL_CODECS["blockdiag"]}, extra_vocab=3)
    engine = harness(pair, mode="reconstruct")
    slow = SlowUploader()
    engine.core.loader._uploader = slow
    late = engine.submit("blockdiag", PROMPT)
    engine.until(slow.begun.is_set)
    grown = [p for p in engine.core._runner.base.parameters.values() if p.extra]
    assert grown, "nothing was late"
    assert late.output_ids == []
    slow.gate.set()
    engine.run(late)
    assert late.output_ids == pair.truth("blockdiag", late.request.prompt_ids)[:16]


def test_variant_shown_a_part_at_a_time_is_right_and_lets_steps_run_between(
    served: Callable[..., Served],
    harness: Callable[..., CoreHarness],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "MAX_PART_S", -1.0)
    many = served("llama", ALL_CODECS)
    engine = harness(many)
    handled: list[str] = []
    handle = engine.core.loader.handle

    def noted(message: LoaderMessage) -> LoadFailed | LoadCopied | None:
        handled.append(type(message).__name__)
        return handle(message)

    engine.core.loader.handle = noted  # type: ignore[method-assign]
    running = engine.submit("base", PROMPT)
    late = engine.submit("head", PROMPT)
    engine.run(running, late)
    assert handled.count("LoadCopied") > 20
    for recorded, name in ((running, "base"), (late, "head")):
        want = many.truth(name, recorded.request.prompt_ids)
        assert recorded.output_ids == want[: len(recorded.output_ids)]
        assert recorded.output_ids
    engine.assert_idle()
