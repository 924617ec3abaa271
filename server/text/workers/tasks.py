"""What a text worker can be asked to do: functions by name, each from a frame to a frame.

A new kind of work is a function here and its name in `TASKS`. It runs in the worker, within its
limits, and raises InvalidRequest for what the request is to blame for.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.errors import InvalidRequest
from server.text.description import describe
from server.text.encoding import Conversation, LengthLimit, encode_within, render_conversation
from server.text.workers.frames import Frame

MAX_TOKENIZERS = 4
MAX_TOKENIZER_FILE_BYTES = 64 << 20  # of all that are kept; one is kept whatever its size


@dataclass(slots=True)
class Tokenizers:
    """The tokenizers that this worker has loaded, the last used last.

    A folder's content never changes: it is named by its digest, or is the base's.
    """

    _kept: OrderedDict[str, tuple[PreTrainedTokenizerBase, int]] = field(
        default_factory=OrderedDict
    )

    def load(self, folder: str) -> PreTrainedTokenizerBase:
        """Return a folder's tokenizer. Raises whatever transformers makes of its files."""
        if folder not in self._kept:
            n_bytes = sum(file.stat().st_size for file in Path(folder).glob("*token*"))
            self._make_room(n_bytes)
            self._kept[folder] = (load_fast_tokenizer(Path(folder)), n_bytes)
        self._kept.move_to_end(folder)
        return self._kept[folder][0]

    def _make_room(self, n_bytes: int) -> None:
        while self._kept and (
            len(self._kept) >= MAX_TOKENIZERS
            or n_bytes + sum(size for _, size in self._kept.values()) > MAX_TOKENIZER_FILE_BYTES
        ):
            self._kept.popitem(last=False)


def load_fast_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read a folder's tokenizer. Raises ValueError for one without a tokenizer.json, and whatever
    transformers makes of files that it cannot use.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.is_fast:
        raise ValueError("this server takes only fast tokenizers, which have a tokenizer.json")
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], blob: bytes) -> Frame:
    text = blob.decode("utf-8", "surrogatepass")
    limit = LengthLimit(**record["limit"])
    ids = encode_within(tokenizer, text, limit, add_special_tokens=record["add_special_tokens"])
    return ids_frame(ids)


def _render(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], blob: bytes) -> Frame:
    conversation = Conversation(**record["conversation"])
    return ids_frame(render_conversation(tokenizer, conversation, LengthLimit(**record["limit"])))


def _describe(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], blob: bytes) -> Frame:
    return Frame(*describe(tokenizer, record["n_rows"]))


Task = Callable[[PreTrainedTokenizerBase, dict[str, Any], bytes], Frame]
TASKS: dict[str, Task] = {"encode": _encode, "render": _render, "describe": _describe}


def do_task(task: str, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> Frame:
    """Do one task. Raises InvalidRequest, and anything else."""
    try:
        return TASKS[task](tokenizer, frame.record, frame.blob)
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
