"""An output never touches what is read: every spelling of a path, and every command."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.checkpoint import outputs
from compressor.checkpoint.outputs import check_dtype, check_free, check_output
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError, OutputError
from tests.compressor.cli.test_app import one_line_error
from tests.compressor.peft.test_adapter import Q, adapter, lora


def link(link: Path, target: Path | str) -> Path:
    link.symlink_to(target)
    return link


# Each makes, in a folder that holds the input `model`, an output that must be refused.
SPELLINGS: dict[str, Callable[[Path], Path | str]] = {
    "same": lambda at: at / "model",
    "slash": lambda at: f"{at}/model/",
    "dot": lambda at: f"{at}/./model/.",
    "up and down": lambda at: at / "model" / ".." / "model",
    "relative": lambda at: os.path.relpath(at / "model"),
    "link": lambda at: link(at / "link", at / "model"),
    "relative link": lambda at: link(at / "link", "model"),
    "link to a link": lambda at: link(at / "two", link(at / "one", "model")),
    "link, then up": lambda at: link(at / "deep", at / "model" / "inner") / ".." / "new",
    "below": lambda at: at / "model" / "out",
    "deep below": lambda at: at / "model" / "new" / "out",
    "below a link": lambda at: link(at / "link", at / "model") / "out",
    "above": lambda at: at,
    "above by a link": lambda at: link(at.parent / f"{at.name}-link", at),
    "link in it": lambda at: link(at / "model" / "away", at / "elsewhere"),
    "where its weights are": lambda at: at / "blobs",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model one of whose files is a link, as in the Hub's cache."""
    at = tmp_path / "at"
    for folder in ("model/inner", "blobs", "elsewhere"):
        (at / folder).mkdir(parents=True)
    (at / "blobs" / "abc").write_text("weights")
    link(at / "model" / "model.safetensors", at / "blobs" / "abc")
    (at / "model" / "config.json").write_text("{}")
    return at


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_output_by_any_spelling_of_an_input_raises(place: Path, spelling: str) -> None:
    out = SPELLINGS[spelling](place)
    with pytest.raises(OutputError, match="must stay as it is"):
        check_output(out, ["org/other", place / "model"])


def test_output_reached_from_another_spelling_of_the_input_raises(place: Path) -> None:
    spelled = link(place.parent / "entry", place) / "model"
    for out in (place / "model", place / "model" / "out", place):
        with pytest.raises(OutputError, match="must stay as it is"):
            check_output(out, [spelled])


def test_output_elsewhere_is_accepted(place: Path) -> None:
    inputs = [place / "model", "org/name"]
    for out in (place / "out", place / "model-2", place / "elsewhere", "new", "a/b/../c"):
        check_output(out, inputs, [place / "blobs" / "abc"])
    check_output(link(place / "away", place / "elsewhere"), inputs)


def test_output_on_a_file_system_without_case_raises(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system finds the same folder by either case; its text differs."""
    found = outputs.identity
    end = len(str(place))

    def identity(path: str | Path) -> tuple[int, int] | None:
        text = str(path)
        return found(text[:end] + text[end:].lower())

    monkeypatch.setattr(outputs, "identity", identity)
    for out in (place / "MODEL", place / "Model" / "out"):
        with pytest.raises(OutputError, match="must stay as it is"):
            check_output(out, [place / "model"])
    check_output(place / "OTHER", [place / "model"])


def test_output_on_a_second_mount_of_the_input_raises(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No link tells, only the inode does."""
    found, mount, there = outputs.identity, place / "mount", place / "model"
    monkeypatch.setattr(
        outputs, "identity", lambda path: found(there if Path(path) == mount else path)
    )
    for out in (mount, mount / "out"):
        with pytest.raises(OutputError, match="must stay as it is"):
            check_output(out, [there])
    for given in (mount, mount / "inner"):
        with pytest.raises(OutputError, match="must stay as it is"):
            check_output(there, [given])


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_input_where_a_run_keeps_its_scratch_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "model").mkdir(parents=True)
    for given in (tmp_path / name, tmp_path / name / "model"):
        with pytest.raises(OutputError, match="contains"):
            check_output(tmp_path / "out", [given])


def test_output_that_is_or_holds_a_single_file_raises(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    file = tmp_path / "texts" / "mine.jsonl"
    file.write_text("{}")
    os.link(file, tmp_path / "hard.html")
    for out in (tmp_path / "texts", file, tmp_path / "hard.html", link(tmp_path / "soft", file)):
        with pytest.raises(OutputError, match="must stay as it is"):
            check_output(out, [], [file])
    check_output(tmp_path / "texts" / "page.html", [], [file])


def test_output_that_is_another_name_of_an_inputs_file_raises(place: Path) -> None:
    os.link(place / "model" / "config.json", place / "page.html")
    with pytest.raises(OutputError, match="is a file of"):
        check_output(place / "page.html", [place / "model"])


def test_output_in_the_cache_of_a_hub_id_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for out in (cache, cache / "models--org--name" / "snapshots" / "1", tmp_path):
        with pytest.raises(OutputError, match="org/name@main, which is read"):
            check_output(out, ["org/name@main"])


def test_free_output_is_new_empty_or_to_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        check_free(tmp_path / name, overwrite=False)
    for out in (tmp_path / "full", link(tmp_path / "dangling", "nowhere")):
        check_free(out, overwrite=True)
        with pytest.raises(OutputError, match="--overwrite"):
            check_free(out, overwrite=False)


def test_dtype_no_checkpoint_is_written_in_raises() -> None:
    check_dtype(None)
    with pytest.raises(InputError, match="bfloat16, got int8"):
        check_dtype("int8")


# --- commands -----------------------------------------------------------------------------------

COMMANDS = {
    "compress base": "compress BASE TUNED {BASE} --codec blockdiag",
    "compress tuned": "compress BASE TUNED {TUNED} --codec blockdiag",
    "compress texts": "compress BASE TUNED {TEXTS} --codec blockdiag --calibration TEXTS/t.txt",
    "import base": "import BASE LORA {BASE}",
    "import adapter": "import BASE LORA {LORA}",
    "compress adapter": "compress BASE LORA {LORA}",
    "reconstruct base": "reconstruct BASE DELTA {BASE}",
    "reconstruct delta": "reconstruct BASE DELTA {DELTA}",
    "export hf base": "export BASE DELTA {BASE} --to hf",
    "export mergekit delta": "export BASE DELTA {DELTA} --to mergekit",
    "export peft base": "export BASE DELTA {BASE} --to peft",
    "export peft texts": "export BASE DELTA {TEXTS} --to peft --calibration TEXTS/t.txt",
    "merge base": "merge BASE TUNED DELTA {BASE}",
    "merge tuned": "merge BASE TUNED DELTA {TUNED}",
    "merge delta": "merge BASE TUNED DELTA {DELTA} --delta",
    "merge recipe": "merge TEXTS/merge.yaml {TEXTS}",
    "merge recipe's base": "merge TEXTS/merge.yaml {BASE}",
    "report delta": "report BASE TUNED DELTA {DELTA}/page.html",
    "report texts": "report BASE TUNED DELTA TEXTS/t.html --data TEXTS/t.html",
}


@pytest.fixture
def read(tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path) -> dict[str, Path]:
    """Copies of everything a command may read, by its name in `COMMANDS`."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    tuned = Path(shutil.copytree(tiny_llama_ft, tmp_path / "tuned"))
    compress(base, tuned, tmp_path / "delta", Options(codec="blockdiag", ratio=8))
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("t.txt", "t.html"):
        (texts / name).write_text("one text of several words\n")
    (texts / "merge.yaml").write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels:\n  - model: {tuned}\n"
    )
    made = adapter(tmp_path / "lora", lora(Q, 64, 64))
    return {"BASE": base, "TUNED": tuned, "DELTA": tmp_path / "delta", "LORA": made, "TEXTS": texts}


def contents(folders: dict[str, Path]) -> dict[str, str]:
    files = (file for folder in folders.values() for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_command_refuses_to_write_over_what_it_reads(read: dict[str, Path]) -> None:
    """The spellings take turns: all commands ask the same function."""
    before = contents(read)
    for folder in read.values():
        link(Path(f"{folder}-link"), folder)
    for number, (name, command) in enumerate(COMMANDS.items()):
        takes_file = "TEXTS" in command.split("{")[-1]  # beside a file that is read there is room
        where = ("{}", "{}-link") if takes_file else ("{}/", "{}/new", "{}-link", "{}/../{}")
        line = command
        for word, folder in read.items():
            out = where[number % len(where)].replace("{}", str(folder), 1)
            line = line.replace("{" + word + "}", out.replace("{}", folder.name))
            line = line.replace(word, str(folder))
        error = one_line_error(*line.split(), "--overwrite")
        assert "must stay as it is" in error, name
    assert contents(read) == before
