"""Projections that read the same input: encoded with equal settings, served in one product."""

from __future__ import annotations

from collections.abc import Iterable

# By the names that transformers' model definitions give them.
SIBLING_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def sibling_groups(names: Iterable[str]) -> list[list[str]]:
    """Group parameter names ``<parent>.<projection>.weight`` of siblings; others stand alone.

    Groups are in the order of their first member, members in the order given.
    """
    groups: dict[tuple[str, int | str], list[str]] = {}
    for name in names:
        groups.setdefault(_group_key(name), []).append(name)
    return list(groups.values())


def _group_key(name: str) -> tuple[str, int | str]:
    parent, _, projection = name.removesuffix(".weight").rpartition(".")
    for index, siblings in enumerate(SIBLING_PROJECTIONS):
        if projection in siblings:
            return parent, index
    return parent, name
