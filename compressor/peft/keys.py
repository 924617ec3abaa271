"""The names of an adapter's stored tensors: which module, which part of its change, whose.

PEFT writes ``base_model.model.<module>.<part>[.weight]``; a file that was made from a training
model's own state has the adapter's name between the two (``lora_A.default.weight``), and then
perhaps two adapters' (DPO's ``reference``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from compressor.errors import InputError

_PREFIXES = ("base_model.model.", "base_model.")
# What PEFT calls a part -> what it is here. Embeddings' factors are kept apart: they are turned.
_PARTS = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_E": "E",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "trainable_tokens_delta": "tokens",
    "hada_w1_a": "hada_w1_a",
    "hada_w1_b": "hada_w1_b",
    "hada_w2_a": "hada_w2_a",
    "hada_w2_b": "hada_w2_b",
    "vera_lambda_b": "vera_lambda_b",
    "vera_lambda_d": "vera_lambda_d",
    "ln_tuning_layers": "full",
    "ia3_l": "ia3",
    **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
_LEAVES = ("weight", "bias")
_PART = re.compile(
    rf"^(?P<module>.+?)(\.token_adapter)?\.(?P<part>{'|'.join(_PARTS)})"
    rf"(\.(?!(?:{'|'.join(_LEAVES)})$)(?P<owner>[^.]+))?(\.(?P<leaf>{'|'.join(_LEAVES)}))?$"
)
_WHOLE = re.compile(r"^(?P<module>.+?)\.modules_to_save(\.(?P<owner>[^.]+))?\.(?P<leaf>[^.]+)$")
_SHARED = re.compile(r"^(?P<part>vera_[AB])(\.(?P<owner>[^.]+))?$")
_WRAPPERS = re.compile(r"(\.base_layer)+(?=\.lora_)")
UNNAMED = "(no name)"


class AdapterKey(NamedTuple):
    """One stored tensor.

    parameter  whose change it is part of, as the base's checkpoint might call it; empty for a
               tensor that all modules share
    part       of that change: ``A``, ``B``, ``full`` (the value itself), ``added``
               (to the value), ...
    owner      the adapter's name, None if the file has none there
    is_common  it belongs to the model, not to one of the adapters
    depth      wrappers of the module that are around it: each is of another parameter
    """

    parameter: str
    part: str
    owner: str | None = None
    is_common: bool = False
    depth: int = 0


def parse_key(key: str) -> AdapterKey | None:
    """Read a stored tensor's name; None for PEFT's untouched copies of modules saved whole."""
    if ".original_module." in key:
        return None
    path = key
    for prefix in _PREFIXES:
        path = path.removeprefix(prefix)
    wrappers = _WRAPPERS.search(path)
    depth = wrappers[0].count(".base_layer") if wrappers else 0
    path = re.sub(r"\.base_layer(?=\.)", "", path)
    if match := _SHARED.match(path):
        return AdapterKey("", match["part"], match["owner"])
    if match := _PART.match(path):
        if match["part"] == "lora_B" and match["leaf"] == "bias":
            return AdapterKey(f"{match['module']}.bias", "added", match["owner"])
        leaf = match["leaf"] if match["part"] == "ln_tuning_layers" else "weight"
        part = _PARTS[match["part"]]
        return AdapterKey(f"{match['module']}.{leaf}", part, match["owner"], depth=depth)
    if match := _WHOLE.match(path):
        return AdapterKey(f"{match['module']}.{match['leaf']}", "full", match["owner"])
    return AdapterKey(path, "full", is_common=True)


def choose_adapter(keys: Iterable[str], wanted: str | None) -> dict[str, AdapterKey]:
    """Return the tensors of one adapter, by their names in the file.

    Raises InputError, naming the adapters, if there are several and none is `wanted`, or not that.
    """
    parsed = {key: found for key in keys if (found := parse_key(key)) is not None}
    owners = sorted({entry.owner or "" for entry in parsed.values() if not entry.is_common})
    listed = ", ".join(owner or UNNAMED for owner in owners)
    if wanted is None and len(owners) > 1:
        raise InputError(
            f"the file holds the adapters {listed}; choose one with --adapter-name, or save it "
            "alone (save_pretrained, selected_adapters)"
        )
    if wanted is not None and wanted not in owners:
        raise InputError(f"the file holds no adapter {wanted}; it has {listed or 'none'}")
    return {
        key: entry
        for key, entry in parsed.items()
        if entry.is_common or wanted is None or entry.owner == wanted
    }
