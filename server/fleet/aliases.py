"""Names that stand for variants: `support:prod` for one, or for several by weight (a canary).

An alias is resolved once for each request, which from then on is its variant's: a change counts
from the next request on, and those that run end on what they began with. A caller always gets the
same one of weighted targets, as long as the weights stay; when they change, no more callers move
than they must.

    NAME            the variant of this name, whatever bytes it has
    NAME@PREFIX     only while its digest begins so
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from server.errors import Conflict, InvalidRequest, ModelNotFound
from server.fleet.store import Change, FleetStore

KIND = "alias"
MAX_TARGETS = 16
ALIAS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
VERSIONED = re.compile(r"([^@]+)@(?:sha256:)?([0-9a-f]{8,64})")
FRACTIONS = 1 << 53  # of a caller's place between 0 and 1

log = logging.getLogger(__name__)


class AliasTarget(BaseModel):
    """One of the variants that an alias stands for, and its share beside the others' weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0


Targets = Annotated[tuple[AliasTarget, ...], Field(min_length=1, max_length=MAX_TARGETS)]
_TARGETS: TypeAdapter[tuple[AliasTarget, ...]] = TypeAdapter(Targets)


@dataclass(frozen=True, slots=True)
class Alias:
    """See the module's docstring."""

    name: str
    targets: tuple[AliasTarget, ...]

    def choose(self, caller: str) -> str:
        """Return the model for a caller; "" is nobody in particular."""
        bounds = list(accumulate(target.weight for target in self.targets))
        place = bounds[-1] * (_place(f"{self.name}\n{caller}") if caller else _random_place())
        for target, bound in zip(self.targets, bounds, strict=True):
            if place < bound:
                return target.model
        return self.targets[-1].model  # a sum was rounded


class Aliases:
    """All aliases. Any thread may ask; admin routes change them one at a time.

    is_model  whether a model of the server's has this name, as `NAME@PREFIX` too
    """

    def __init__(self, store: FleetStore, is_model: Callable[[str], bool]) -> None:
        self._store = store
        self._is_model = is_model
        self._known = dict(self._stored())

    def get(self, name: str) -> Alias | None:
        """Return the alias of this name."""
        return self._known.get(name)

    def all(self) -> list[Alias]:
        """Return the aliases by name."""
        return [alias for _, alias in sorted(self._known.items())]

    def put(self, name: str, targets: Sequence[AliasTarget]) -> Alias:
        """Point a name to these targets from the next request on.

        Raises InvalidRequest, Conflict, StateUnwritable; nothing has changed then.
        """
        if not ALIAS_NAME.fullmatch(name):
            raise InvalidRequest(
                "The name of an alias has 1 to 128 letters, digits, `.`, `_`, `-` and `:`, and "
                "begins with a letter or a digit.",
                param="name",
            )
        if name not in self._known and self._is_model(name):
            raise Conflict(f"A model has the name `{name}`. Choose another for the alias.")
        for target in targets:
            if target.model in self._known or target.model == name:
                raise InvalidRequest(
                    f"`{target.model}` is an alias itself. Name variants as targets.", param="model"
                )
            if not self._is_model(target.model):
                raise InvalidRequest(
                    f"There is no model `{target.model}` with these bytes. Add it first.",
                    param="model",
                )
        alias = Alias(name, tuple(targets))
        self._store.put(KIND, name, {"targets": [target.model_dump() for target in targets]})
        self._known = self._known | {name: alias}
        return alias

    def delete(self, name: str) -> None:
        """Let the name stand for nothing. Raises ModelNotFound, StateUnwritable."""
        if name not in self._known:
            raise no_such_alias(name)
        self._store.delete(KIND, name)
        self._known = {other: alias for other, alias in self._known.items() if other != name}

    def history(self, name: str) -> list[Change]:
        """Return what it stood for, newest change first."""
        return self._store.history(KIND, name)

    def roll_back(self, name: str) -> Alias:
        """Take the last change back; doing so again takes that back.

        Raises ModelNotFound, Conflict: it was only just made.
        """
        changes = self.history(name)
        if not changes:
            raise no_such_alias(name)
        before = changes[0].before
        if before is None:
            raise Conflict(f"The alias `{name}` stood for nothing before. Delete it instead.")
        return self.put(name, _TARGETS.validate_python(before["targets"]))

    def _stored(self) -> Any:
        for name, body in self._store.all(KIND).items():
            try:
                yield name, Alias(name, _TARGETS.validate_python(body.get("targets")))
            except ValidationError:
                log.error("the alias %s is stored in a form that this version does not know", name)


def no_such_alias(name: str) -> ModelNotFound:
    """Return the refusal of a name that is no alias."""
    return ModelNotFound(f"There is no alias `{name[:200]}`.", param="name")


def versioned(model: str) -> tuple[str, str] | None:
    """Return name and digest's beginning of ``NAME@PREFIX``; None for any other model."""
    match = VERSIONED.fullmatch(model)
    return None if match is None else (match[1], match[2])


def _place(text: str) -> float:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / FRACTIONS


def _random_place() -> float:
    return secrets.randbits(53) / FRACTIONS
