"""Text work for the engine: what is done here, what by text workers, and what their ends mean.

In this process: short prompts with the base's tokenizer, and decoding. By text workers: every chat
template, long prompts, and all encoding with a variant's own tokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.errors import DeltaUnusable, GenerationFailed, ServeError, TextLimit
from server.settings import Settings
from server.text.assets import TextAssets
from server.text.description import Description, described
from server.text.encoding import Conversation, LengthLimit, Messages, encode
from server.text.quarantine import Quarantine
from server.text.store import TokenizerStore
from server.text.workers.frames import Frame
from server.text.workers.pool import Limits, PoolStats, TaskFailed, TextTask, TextWorkers
from server.text.workers.tasks import ids_of
from server.text.workers.worker import WorkerEnded

# Encoding takes 1.4 ms at this length (SmolLM2's tokenizer, a busy Xeon; 2.3 ms on a busy Zen 4),
# which streams do not feel; tokenizers 0.23 lets others have the interpreter meanwhile. The way to
# a text worker and back costs .1 to .2 ms (and a wait if all of them are busy): half of the time of
# a short prompt, a tenth at this length.
MAX_CHARS_HERE = 4096
LONG_CHARS = 1 << 16
LONG = "long"  # the share of long texts
BASE = "base"
RETRY_AFTER_S = 30
_WORDS = {
    "cpu": "took too much processor time",
    "wall": "took too long",
    "memory": "took too much memory",
    "crash": "ended a text worker",
    "abandoned": "was given up",
}


class TextService:
    """Thread-safe but for the coroutines, which belong to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._literal_specials = not settings.allow_special_tokens_in_content
        self._workers = TextWorkers(
            settings.text_workers,
            Limits(
                settings.text_task_cpu_s,
                settings.text_task_timeout_s,
                settings.text_worker_memory_bytes,
            ),
            first_folder=str(settings.base),  # so that a new worker is as fast as the one before
        )
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="text")
        self.store = TokenizerStore()
        self.quarantine = Quarantine()

    def start(self) -> None:
        """Start the text workers; otherwise the first task does."""
        self._workers.start()

    def stats(self) -> PoolStats:
        return self._workers.stats()

    def close(self) -> None:
        """End the text workers and forget what waits for them."""
        self._workers.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    # -- encoding --------------------------------------------------------------------------------

    async def encode(
        self,
        text: TextAssets,
        prompt: str,
        max_model_len: int,
        *,
        add_special_tokens: bool = True,
        tenant: str = "",
    ) -> list[int]:
        """Token ids of a prompt. Raises InvalidRequest, TextLimit, DeltaUnusable, QueueFull."""
        limit = _length_limit(text, max_model_len)
        tokenizer = text.tokenizer
        if tokenizer is not None and len(prompt) <= MAX_CHARS_HERE:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads,
                lambda: encode(tokenizer, prompt, add_special_tokens=add_special_tokens),
            )
        record = {"limit": asdict(limit), "add_special_tokens": add_special_tokens}
        blob = prompt.encode("utf-8", "surrogatepass")
        owner = text.owner if tokenizer is None else ""  # the base's tokenizer is nobody's fault
        task = self._task("encode", text, owner, record, len(prompt), blob, tenant=tenant)
        return ids_of(await self._done(task, owner))

    async def render_chat(
        self,
        text: TextAssets,
        messages: Messages,
        max_model_len: int,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tenant: str = "",
    ) -> list[int]:
        """Token ids of a conversation. Raises as `encode` does."""
        limit = _length_limit(text, max_model_len)
        n_chars = sum(len(message.get("content") or "") for message in messages)
        conversation = Conversation(
            messages,
            text.template,
            add_generation_prompt,
            continue_final_message,
            add_special_tokens,
            self._literal_specials,
        )
        record = {"limit": asdict(limit), "conversation": asdict(conversation)}
        task = self._task("render", text, text.owner, record, n_chars, tenant=tenant)
        return ids_of(await self._done(task, text.owner))

    # -- decoding --------------------------------------------------------------------------------

    async def decode(
        self, text: TextAssets, token_ids: Sequence[int], *, is_whole: bool = True
    ) -> str:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: text.decode(token_ids, is_whole=is_whole)
        )

    async def token_texts(self, text: TextAssets, token_ids: Sequence[int]) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: text.token_texts(token_ids)
        )

    # -- opening ---------------------------------------------------------------------------------

    def describe(self, folder: Path, owner: str, n_rows: int) -> Description:
        """Have a text worker load a stranger's tokenizer. Blocks; for a worker thread.

        n_rows  of the model's vocabulary. Raises Undescribed, TaskFailed, TextLimit, DeltaUnusable.
        """
        self._check(owner)
        task = TextTask("describe", str(folder), owner, (owner, LONG), {"n_rows": n_rows})
        future = self._workers.submit(task)
        try:
            reply = future.result()
        except WorkerEnded as error:
            raise self._limit(error, owner) from error
        return described(reply.record, reply.blob)

    # -- tasks and their ends --------------------------------------------------------------------

    def _task(
        self,
        name: str,
        text: TextAssets,
        owner: str,
        record: dict[str, Any],
        n_chars: int,
        blob: bytes = b"",
        *,
        tenant: str,
    ) -> TextTask:
        owned = (owner,) if owner else ()
        shares = (*owned, LONG) if n_chars > LONG_CHARS else owned
        return TextTask(name, str(text.folder), owner or BASE, shares, record, blob, tenant)

    async def _done(self, task: TextTask, owner: str) -> Frame:
        """What the worker answers; a caller that is cancelled takes the task along."""
        self._check(owner)
        future: Future[Frame] = self._workers.submit(task)
        try:
            return await asyncio.wrap_future(future)
        except WorkerEnded as error:
            raise self._limit(error, owner) from error
        except TaskFailed as error:
            raise self._failed(error, owner) from error

    def _check(self, owner: str) -> None:
        """Refuse work for a variant that ended too many workers. Raises DeltaUnusable."""
        reason = self.quarantine.reason(owner) if owner else None
        if reason is not None:
            raise DeltaUnusable(
                f"this model is in quarantine: {reason}",
                param="model",
                retry_after_s=self.quarantine.remaining_s(owner),
            )

    def _limit(self, error: WorkerEnded, owner: str) -> ServeError:
        if owner and error.reason != "abandoned":
            self.quarantine.record(owner)
        whose = "with this model's own template or tokenizer " if owner else ""
        return TextLimit(
            f"Work on this text {whose}{_WORDS[error.reason]} and was ended. "
            "Shorten the text; if it is short, an operator must correct the model's text files.",
            retry_after_s=RETRY_AFTER_S,
        )

    @staticmethod
    def _failed(error: TaskFailed, owner: str) -> ServeError:
        if owner:
            return DeltaUnusable(
                f"this model's tokenizer failed ({error}); an operator must correct its files and "
                "compress it again",
                param="model",
                retry_after_s=RETRY_AFTER_S,
            )
        return GenerationFailed(f"tokenising this text failed ({error})")


def _length_limit(text: TextAssets, max_model_len: int) -> LengthLimit:
    return LengthLimit(max_model_len, max_model_len * text.chars_per_token)
