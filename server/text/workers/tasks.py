"""What a text worker can be asked to do: functions by name, each from a frame to a frame.

A new kind of work is a function here and its name in `TASKS`. It runs in the worker, within its
limits, and raises InvalidRequest for what the request is to blame for.
"""

from __future__ import annotations

import copyreg
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.errors import InvalidRequest
from server.text.control_tokens import ControlTokensByTemplate
from server.text.description import Undescribed, describe
from server.text.encoding import Conversation, LengthLimit, encode_within, render_conversation
from server.text.workers.frames import Frame

MAX_TOKENIZERS = 4
MAX_ADDED_TOKENS = 1 << 17
MAX_TOKENIZER_FILE_BYTES = 64 << 20  # of all that are kept; one is kept whatever its size


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer, what was found out about it, and the size of its files."""

    tokenizer: PreTrainedTokenizerBase
    controls: ControlTokensByTemplate
    n_bytes: int


@dataclass(slots=True)
class Tokenizers:
    """The tokenizers that this worker has loaded, the last used last.

    A folder's content never changes: it is named by its digest, or is the base's.
    """

    _kept: OrderedDict[str, LoadedTokenizer] = field(default_factory=OrderedDict)

    def load(self, folder: str) -> LoadedTokenizer:
        """Return a folder's tokenizer. Raises Undescribed, and whatever transformers makes of its
        files.
        """
        if folder not in self._kept:
            n_bytes = sum(file.stat().st_size for file in Path(folder).glob("*token*"))
            self._make_room(n_bytes)
            tokenizer = load_fast_tokenizer(Path(folder))
            controls = ControlTokensByTemplate(tokenizer)
            self._kept[folder] = LoadedTokenizer(tokenizer, controls, n_bytes)
        self._kept.move_to_end(folder)
        return self._kept[folder]

    def _make_room(self, n_bytes: int) -> None:
        while self._kept and (
            len(self._kept) >= MAX_TOKENIZERS
            or n_bytes + sum(one.n_bytes for one in self._kept.values()) > MAX_TOKENIZER_FILE_BYTES
        ):
            self._kept.popitem(last=False)


def share_added_tokens() -> None:
    """Let copies of a tokenizer's settings share its added tokens, which nobody changes.

    transformers copies the settings deeply: half of the processor time that a tokenizer of 100,000
    added tokens took to load, 5.6 s. For a text worker, which sends no such objects anywhere.
    """
    copyreg.pickle(AddedToken, lambda _: AddedToken.__name__)  # a name stands for the object itself


def load_fast_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read a folder's tokenizer. Raises Undescribed for one that is not served, and whatever
    transformers makes of files that it cannot use.
    """
    _check_added_tokens(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.is_fast:
        raise Undescribed("this server takes only fast tokenizers, which have a tokenizer.json")
    return tokenizer


def _check_added_tokens(folder: Path) -> None:
    """Refuse too many before transformers makes objects of them, which takes 50 us for each."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    content = json.loads(path.read_bytes())
    added = content.get("added_tokens") if isinstance(content, dict) else None
    if isinstance(added, list) and len(added) > MAX_ADDED_TOKENS:
        raise Undescribed(
            f"it has {len(added)} added tokens, and this server takes at most {MAX_ADDED_TOKENS}; "
            "make them tokens of its model"
        )


def _encode(loaded: LoadedTokenizer, record: dict[str, Any], blob: bytes) -> Frame:
    text = blob.decode("utf-8", "surrogatepass")
    limit = LengthLimit(**record["limit"])
    add_special_tokens = record["add_special_tokens"]
    return ids_frame(
        encode_within(loaded.tokenizer, text, limit, add_special_tokens=add_special_tokens)
    )


def _render(loaded: LoadedTokenizer, record: dict[str, Any], blob: bytes) -> Frame:
    conversation, limit = Conversation(**record["conversation"]), LengthLimit(**record["limit"])
    return ids_frame(render_conversation(loaded.tokenizer, conversation, limit, loaded.controls))


def _describe(loaded: LoadedTokenizer, record: dict[str, Any], blob: bytes) -> Frame:
    return Frame(*describe(loaded.tokenizer, record["n_rows"]))


Task = Callable[[LoadedTokenizer, dict[str, Any], bytes], Frame]
TASKS: dict[str, Task] = {"encode": _encode, "render": _render, "describe": _describe}


def do_task(task: str, loaded: LoadedTokenizer, frame: Frame) -> Frame:
    """Do one task. Raises InvalidRequest, and anything else."""
    try:
        return TASKS[task](loaded, frame.record, frame.blob)
    except UnicodeDecodeError as error:
        raise InvalidRequest("the text is not Unicode", param="prompt") from error


def ids_frame(ids: list[int]) -> Frame:
    """Token ids as bytes."""
    return Frame({"n": len(ids)}, array("I", ids).tobytes())


def ids_of(frame: Frame) -> list[int]:
    """Read what `ids_frame` made."""
    ids = array("I")
    ids.frombytes(frame.blob)
    return ids.tolist()
