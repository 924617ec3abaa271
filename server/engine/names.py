"""The served names for who adds and removes variants; see `server.fleet.names`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from server.deltas.failures import Failed, Failure
from server.deltas.registry import RegisteredDelta
from server.engine.catalog import VariantCatalog
from server.errors import ArtifactRefused, DeltaUnusable
from server.fleet.names import Stage


class CatalogNames:
    """Of the catalog.

    changed  called, with what there was before, when what a name means may have changed
    tell     is told of each stage of what is coming, and why it never came
    """

    def __init__(
        self,
        catalog: VariantCatalog,
        changed: Callable[[Sequence[RegisteredDelta]], None],
        tell: Callable[[Stage, str, str], None],
    ) -> None:
        self._catalog = catalog
        self._registry = catalog.registry
        self._changed = changed
        self._tell = tell

    def is_reserved(self, name: str) -> bool:
        return self._registry.is_reserved(name)

    def owner(self, name: str) -> Literal["deltas", "state"] | None:
        delta = self._registry.get(name)
        if delta is None or delta.stage is not None:
            return None
        return "state" if self._registry.is_managed(delta) else "deltas"

    def digest(self, name: str) -> str | None:
        delta = self._registry.get(name)
        return None if delta is None or delta.failure is not None else delta.digest

    def announce(self, name: str, stage: Stage, error: str | None = None) -> None:
        failure = None if error is None else Failure(error, "an operator must see to it")
        self._registry.announce(name, stage, failure)
        self._tell(stage, name, error or "")

    def withdraw(self, name: str) -> bool:
        return self._registry.withdraw(name)

    def verify(self, path: Path) -> str:
        try:
            return self._registry.verified(path).digest
        except Failed as error:
            failure = error.failure
            message = f"The artifact cannot be served: {failure.reason}; {failure.remedy}."
            if failure.retry_after_s is None:
                raise ArtifactRefused(message) from error
            raise DeltaUnusable(message, retry_after_s=failure.retry_after_s) from error

    def reread(self, name: str, moved_to: Path | None = None) -> None:
        before = self._registry.all()
        self._catalog.reread(name, moved_to)
        self._changed(before)

    def forget(self, path: Path) -> None:
        self._registry.forget(path)
