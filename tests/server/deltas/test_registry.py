"""Discovery: names, bad artifacts, changes between scans."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.artifact.reader import read_digest
from compressor.artifact.signature import (
    dump_signatures,
    generate_key,
    load_private_key,
    load_public_key,
    signature_of,
)
from server.deltas import registry as registry_module
from server.deltas.registry import DeltaRegistry
from server.errors import DeltaBroken, DeltasUnreadable
from tests.compressor.artifacts import BASE, CONFIG, edit_config, seal, write_artifact
from tests.unprivileged import forbid, open_folder, run_unprivileged


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "one"
    write_artifact(path)
    return path


@pytest.fixture
def root(tmp_path: Path, artifact: Path) -> Path:
    shutil.copytree(artifact, tmp_path / "one")
    return tmp_path


def scan(root: Path, base: str = BASE, reserved: frozenset[str] = frozenset()) -> DeltaRegistry:
    registry = DeltaRegistry(root, base, reserved)
    registry.rescan()
    return registry


def test_rescan_finds_every_folder_and_nothing_else(root: Path, artifact: Path) -> None:
    for name in ("B2", "with.dots-and_more"):
        shutil.copytree(artifact, root / name)
    (root / ".one.partial").mkdir()
    (root / "a-file").write_text("not a delta")
    os.symlink(artifact, root / "linked")  # how a Kubernetes volume presents a folder
    found = scan(root).all()
    assert [d.name for d in found] == ["B2", "linked", "one", "with.dots-and_more"]
    assert all(d.error is None for d in found)


def test_rescan_reads_what_the_list_shows(root: Path) -> None:
    found = scan(root).get("one")
    assert found is not None
    assert found.codec == "blockdiag"
    assert found.fidelity == CONFIG.fidelity
    assert found.n_bytes == sum(f.stat().st_size for f in (root / "one").iterdir())
    assert len(found.digest) == 64


def test_no_directory_means_no_variants() -> None:
    registry = DeltaRegistry(None, BASE)
    registry.rescan()
    assert registry.all() == []


def truncate(path: Path) -> None:
    (path / "delta_config.json").write_bytes(b'{"format":')


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def other_base(path: Path) -> None:
    edit_config(path, lambda c: c["base"].update(identity="cd" * 32, name_or_path="/secret/base"))


def newer_format(path: Path) -> None:
    edit_config(path, lambda c: c.update(format_version=99))


def not_json(path: Path) -> None:
    edit_config(path, lambda c: c.clear())


def link(path: Path) -> None:
    file = path / "delta_config.json"
    file.rename(path.parent / "elsewhere.json")
    file.symlink_to(path.parent / "elsewhere.json")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "Corrupt"),
        (empty, "NotADelta"),
        (other_base, "WrongBase"),
        (newer_format, "UnsupportedVersion"),
        (not_json, ""),
        (link, "Corrupt"),
    ],
)
def test_rescan_bad_artifact_is_listed_with_an_error_without_a_path(
    root: Path, artifact: Path, damage: Callable[[Path], None], says: str
) -> None:
    shutil.copytree(artifact, root / "bad")
    damage(root / "bad")
    registry = scan(root)
    bad, good = registry.get("bad"), registry.get("one")
    assert bad is not None
    assert good is not None
    assert bad.error is not None
    assert says in bad.error
    assert str(root) not in bad.error
    assert "/" not in bad.error
    assert good.error is None  # the others are served


@pytest.mark.parametrize("name", ["sp ace", "-dash", "\u0430lpha", "x" * 129, "the-base", "a:b"])
def test_rescan_name_that_cannot_be_a_model_is_listed_with_an_error(
    root: Path, artifact: Path, name: str
) -> None:
    shutil.copytree(artifact, root / name)
    registry = scan(root, reserved=frozenset({"the-base"}))
    found = registry.get(name)
    assert found is not None
    assert found.error is not None
    assert "rename" in found.error


def test_rescan_sees_changed_new_and_removed_artifacts(root: Path, artifact: Path) -> None:
    registry = scan(root)
    before = registry.get("one")
    shutil.copytree(artifact, root / "two")
    edit_config(root / "one", lambda c: c.update(seed=8))
    assert registry.get("two") is None  # only `rescan` changes what is served
    registry.rescan()
    after = registry.get("one")
    assert before is not None
    assert after is not None
    assert after.digest != before.digest
    assert registry.get("two") is not None
    shutil.rmtree(root / "one")
    registry.rescan()
    assert registry.get("one") is None
    assert registry.with_digest(before.digest) == [registry.get("two")]


def test_rescan_repaired_artifact_loses_its_error(root: Path, artifact: Path) -> None:
    truncate(root / "one")
    registry = scan(root)
    shutil.rmtree(root / "one")
    shutil.copytree(artifact, root / "one")
    registry.rescan()
    found = registry.get("one")
    assert found is not None
    assert found.error is None


SCAN = """
import sys
from pathlib import Path
from server.deltas.registry import DeltaRegistry
"""
SHOW = """
registry = DeltaRegistry(Path(sys.argv[1]), sys.argv[2])
registry.rescan()
print(registry.get("one").error)
"""


@pytest.mark.parametrize("name", ["delta.safetensors", "delta_config.json", "SHA256SUMS", "."])
def test_rescan_artifact_that_this_user_may_not_read_is_listed_with_the_remedy(
    artifact: Path, name: str
) -> None:
    with open_folder() as folder:
        copy = Path(shutil.copytree(artifact, folder / "one"))
        for file in copy.iterdir():
            file.chmod(0o644)
        copy.chmod(0o755)
        forbid(copy / name)
        done = run_unprivileged(SCAN, SHOW, [str(folder), BASE])
        copy.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "may not be read by" in done.stdout
    assert "chmod a+r" in done.stdout
    assert "/" not in done.stdout
    assert name == "." or name in done.stdout


def test_rescan_says_how_many_are_served_and_names_the_first_that_are_not(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(7):
        (root / f"empty{n}").mkdir()
    with caplog.at_level(logging.INFO):
        scan(root)
    found, refused = (record.getMessage() for record in caplog.records)
    assert found == f"1 of 8 variants in {root} can be served"
    assert refused.startswith("variants cannot be served: empty0 (NotADelta: no SHA256SUMS here")
    assert "empty4 (" in refused
    assert "empty5" not in refused
    assert refused.endswith("; and 2 more, which GET /v1/deltas lists")


def test_rescan_unreadable_root_keeps_the_names_known_before(root: Path) -> None:
    registry = scan(root)
    root.rename(root.with_name("moved"))
    try:
        with pytest.raises(DeltasUnreadable, match="No such file") as caught:
            registry.rescan()
        assert str(root) not in caught.value.message
        assert registry.get("one") is not None
    finally:
        root.with_name("moved").rename(root)


def test_rescan_folder_whose_name_is_no_text_is_listed_with_an_error(
    root: Path, artifact: Path
) -> None:
    shutil.copytree(artifact, root / os.fsdecode(b"caf\xe9"))
    registry = scan(root)
    assert [d.name for d in registry.all()] == ["caf\\xe9", "one"]
    for delta in registry.all():
        delta.name.encode("utf-8")
    bad = registry.get("caf\\xe9")
    assert bad is not None
    assert bad.error is not None
    assert "rename" in bad.error


def test_rescan_names_that_differ_by_case_are_two_variants(root: Path, artifact: Path) -> None:
    shutil.copytree(artifact, root / "ONE")
    registry = scan(root)
    assert [(d.name, d.error) for d in registry.all()] == [("ONE", None), ("one", None)]
    assert registry.get("One") is None


def test_rescan_generation_config_that_cannot_be_used_is_listed_with_its_key(root: Path) -> None:
    (root / "one" / "generation_config.json").write_text('{"repetition_penalty": 0}')
    seal(root / "one")
    found = scan(root).get("one")
    assert found is not None
    assert found.error is not None
    assert "repetition_penalty" in found.error
    assert found.failure is not None
    assert isinstance(found.failure.error_for("one"), DeltaBroken)


def test_rescan_weights_that_are_missing_or_empty_are_listed_with_an_error(root: Path) -> None:
    (root / "one" / "delta.safetensors").write_bytes(b"")
    found = scan(root).get("one")
    assert found is not None
    assert found.error is not None
    assert "empty" in found.error


def test_rescan_without_descriptors_keeps_what_is_known(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = scan(root)

    def fails(path: Path) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("server.deltas.registry.read_digest", fails)
    registry.rescan()
    kept = registry.get("one")
    assert kept is not None
    assert kept.error is None
    fresh = scan(root).get("one")
    assert fresh is not None
    assert fresh.failure is not None
    error = fresh.failure.error_for("one")
    assert (error.status, error.retry_after_s) == (503, 5)
    assert "too many open files" in error.message


def test_rescan_does_not_read_a_broken_artifact_again_until_it_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(root / "one", lambda record: record.update(seed=-1))
    registry, calls = scan(root), []
    inner = registry_module.describe_artifact

    def counted(path: Path, **options: str) -> object:
        calls.append(path)
        return inner(path, **options)

    monkeypatch.setattr(registry_module, "describe_artifact", counted)
    registry.rescan()
    registry.rescan()
    assert calls == []
    edit_config(root / "one", lambda record: record.update(seed=3))
    failed = registry.get("one")
    assert failed is not None
    assert registry.refresh(failed).error is None
    assert len(calls) == 1
    now = registry.get("one")
    assert now is not None
    assert now.error is None


def test_refresh_of_an_unchanged_artifact_gives_the_same(root: Path) -> None:
    truncate(root / "one")
    registry = scan(root)
    failed = registry.get("one")
    assert failed is not None
    assert registry.refresh(failed) is failed


def test_rescan_circle_of_links_is_listed_with_an_error(root: Path) -> None:
    (root / "circle").symlink_to(root / "circle")
    registry = scan(root)
    found = registry.get("circle")
    assert found is not None
    assert found.error is not None
    good = registry.get("one")
    assert good is not None
    assert good.error is None


def test_rescan_with_signers_refuses_what_none_of_them_signed(root: Path) -> None:
    keys = {}
    for name in ("key", "other"):
        private, public = generate_key()
        (root / f"{name}.pem").write_bytes(private)
        (root / f"{name}.pub").write_bytes(public)
        keys[name] = load_private_key(root / f"{name}.pem")
    for name in ("signed", "foreign", "changed", "torn"):
        shutil.copytree(root / "one", root / name)
        key = keys["other" if name == "foreign" else "key"]
        signature = signature_of(read_digest(root / name), key)
        (root / name / "SHA256SUMS.sig").write_bytes(dump_signatures([signature]))
    config = root / "changed" / "delta_config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    seal(root / "changed")
    (root / "torn" / "SHA256SUMS.sig").write_bytes(b"ed25519")
    registry = DeltaRegistry(root, BASE, signers=[load_public_key(root / "key.pub")])
    registry.rescan()
    errors = {delta.name: delta.error or "" for delta in registry.all()}
    assert errors["signed"] == ""
    assert "not signed" in errors["one"]
    assert "none of the keys" in errors["foreign"]
    assert "changed after" in errors["changed"]
    assert "SHA256SUMS.sig" in errors["torn"]
    # Signed now: found at the next request, without a rescan.
    shutil.copy(root / "signed" / "SHA256SUMS.sig", root / "one")
    failed = registry.get("one")
    assert failed is not None
    assert registry.refresh(failed).error is None
