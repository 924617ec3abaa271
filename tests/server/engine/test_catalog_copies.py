"""One artifact's fate is its own: broken copies, twins, scarce resources, and what is forgotten."""

from __future__ import annotations

import gc
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compressor.artifact import files
from server.deltas.failures import Failed
from server.engine.variant import Variant
from server.errors import DeltaBroken, DeltasUnreadable, DeltaUnusable, ModelNotFound
from tests.compressor.artifacts import edit_config
from tests.server.conftest import Served
from tests.server.engine.test_catalog import PROMPT, flip_a_bit, own, put, zoo
from tests.server.helpers import CoreHarness

__all__ = ["own", "zoo"]  # fixtures
Make = Callable[..., CoreHarness]

# -- one artifact's fate is its own --------------------------------------------------------------


def count_reads(monkeypatch: pytest.MonkeyPatch, own: Served) -> dict[str, int]:
    """How many bytes of each folder are read from now on, by the folder's name."""
    read: dict[str, int] = {}
    inner = files._read_exactly

    def counted(descriptor: int, size: int, name: str) -> bytearray:
        folder = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name
        if name != files.CHECKSUMS:
            read[folder] = read.get(folder, 0) + size
        return inner(descriptor, size, name)

    monkeypatch.setattr(files, "_read_exactly", counted)
    return read


def test_broken_text_is_read_once_until_its_files_change(
    own: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = own.deltas / "vocab" / "tokenizer.json"
    whole = tokenizer.read_bytes()
    catalog = harness(own).catalog
    flip_a_bit(tokenizer)
    read = count_reads(monkeypatch, own)
    for _ in range(5):
        with pytest.raises(DeltaBroken, match=r"`vocab` cannot be served: Corrupt: tokenizer"):
            catalog.open("vocab")
    assert read["vocab"] < 2 * sum(f.stat().st_size for f in (own.deltas / "vocab").iterdir())
    tokenizer.write_bytes(whole)
    assert catalog.open("vocab").digest is not None
    assert catalog.open_error(catalog.registry.get("vocab")) is None


def test_broken_weights_are_read_once_until_their_file_changes(
    own: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = harness(own)
    engine.catalog.open("impart")
    flip_a_bit(own.deltas / "impart" / "delta.safetensors")
    read = count_reads(monkeypatch, own)
    for _ in range(4):
        bad = engine.submit("impart", PROMPT)
        engine.run(bad)
        assert isinstance(bad.error, DeltaBroken)
    assert read["impart"] < 2 * sum(f.stat().st_size for f in (own.deltas / "impart").iterdir())


def test_copy_that_only_claims_a_digest_takes_nobody_down(own: Served, harness: Make) -> None:
    fake = own.deltas / "aaa"  # before `impart` in every order of names
    put(own.deltas / "impart", fake)
    weights = (fake / "delta.safetensors").read_bytes()
    (fake / "delta.safetensors").write_bytes(weights[:100])
    engine = harness(own, max_resident_variants=1)
    for name in ("aaa", "impart", "blockdiag", "impart", "blockdiag", "aaa"):
        one = engine.submit(name, PROMPT)
        engine.run(one)
        assert one.error is None
        truth = "impart" if name == "aaa" else name
        assert one.output_ids == own.truth(truth, one.request.prompt_ids)[:16]
    assert engine.core.loader.errors == {}


def test_twin_that_is_deleted_or_damaged_leaves_the_other_alone(own: Served, harness: Make) -> None:
    for name in ("a-twin", "z-twin"):
        put(own.deltas / "vocab", own.deltas / name)
    engine = harness(own, max_resident_variants=1)
    engine.run(engine.submit("a-twin", PROMPT))
    shutil.rmtree(own.deltas / "a-twin")
    flip_a_bit(own.deltas / "vocab" / "delta.safetensors")
    flip_a_bit(own.deltas / "vocab" / "tokenizer.json")
    for name in ("z-twin", "blockdiag", "vocab"):
        one = engine.submit(name, PROMPT)
        engine.run(one)
        assert one.error is None
    fresh = harness(own)  # nothing opened yet: its text comes from the twin, too
    assert fresh.encode(fresh.catalog.open("vocab"), "<extra_1>")[-1] == 321


def test_error_of_shared_bytes_names_the_variant_that_was_asked_for(
    own: Served, harness: Make
) -> None:
    for name in ("a-twin", "z-twin"):
        put(own.deltas / "impart", own.deltas / name)
    engine = harness(own)
    sent = [engine.submit(name, PROMPT) for name in ("z-twin", "a-twin", "impart")]
    for name in ("a-twin", "z-twin", "impart"):
        flip_a_bit(own.deltas / name / "delta.safetensors")
    engine.run(*sent)
    for one, name in zip(sent, ("z-twin", "a-twin", "impart"), strict=True):
        assert isinstance(one.error, DeltaBroken)
        assert one.error.message.startswith(f"`{name}` cannot be served: Corrupt")
        others = {"a-twin", "z-twin", "impart"} - {name}
        assert not any(other in one.error.message for other in others)


def test_no_descriptor_left_is_told_as_that_and_passes(own: Served, harness: Make) -> None:
    engine = harness(own)
    catalog = engine.catalog
    engine.run(engine.submit("impart", PROMPT))
    with no_descriptors_left(), pytest.raises(DeltaUnusable) as caught:
        catalog.open("vocab")
    assert "too many open files" in caught.value.message
    assert "Corrupt" not in caught.value.message
    assert "again" not in caught.value.message.replace("try again later", "")
    assert caught.value.retry_after_s
    with no_descriptors_left(), pytest.raises(DeltasUnreadable):
        catalog.rescan()
    assert catalog.open("vocab").name == "vocab"


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_memory_to_open_is_told_as_that(
    own: Served, harness: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = harness(own).catalog

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("server.engine.catalog.load_variant_text", fails)
    with pytest.raises(DeltaUnusable, match="not enough memory") as caught:
        catalog.open("vocab")
    assert caught.value.retry_after_s
    monkeypatch.undo()
    assert catalog.open("vocab").name == "vocab"


# -- what is forgotten ---------------------------------------------------------------------------


def test_replaced_variants_are_forgotten(own: Served, harness: Make) -> None:
    engine = harness(own)
    catalog, folder = engine.catalog, own.deltas / "blockdiag"
    seen: set[str] = set()
    for seed in range(500):
        edit_config(folder, lambda record, seed=seed: record.update(seed=seed + 1))
        catalog.rescan()
        variant = catalog.open("blockdiag")
        assert variant.digest not in seen
        seen.add(variant.digest)
        if seed % 100 == 0:  # a broken one between them
            (folder / files.CHECKSUMS).write_text("none")
            catalog.rescan()
            with pytest.raises(DeltaBroken):
                catalog.open("blockdiag")
    assert len(seen) == 500
    assert len(catalog._opened) == 1
    assert len(catalog._errors) == 0
    assert len(catalog._known) <= 1
    shutil.rmtree(folder)
    catalog.rescan()
    del variant
    gc.collect()
    assert not [v for v in gc.get_objects() if type(v) is Variant and v.digest in seen]
    assert catalog._opened == {}
    assert len(catalog._known) == 0


def test_variant_of_a_running_request_outlives_the_rescan_that_forgets_it(
    own: Served, harness: Make
) -> None:
    engine = harness(own, max_resident_variants=1)
    old = engine.catalog.open("impart")
    (own.deltas / "impart").rename(own.deltas / ".moved")
    engine.catalog.rescan()
    with pytest.raises(ModelNotFound):
        engine.catalog.open("impart")
    job = engine.catalog.job_for(old)
    with pytest.raises(Failed, match="cannot be opened as a directory"):
        job.read()
    (own.deltas / ".moved").rename(own.deltas / "impart")
    assert job.read().digest == old.digest
