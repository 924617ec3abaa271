"""The model card: ``README.md`` with the metadata the Hugging Face Hub reads.

What the card says of the fine-tune itself (licence, languages, data sets) is taken from the
fine-tune's own card; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.artifact.config import DeltaConfig
from compressor.artifact.wording import difference_from, ignored_settings, stored_as
from compressor.printable import printable

CARD = "README.md"

_MAX_CARD_BYTES = 1 << 20
_TEXT_KEYS = ("license", "license_name", "license_link")
_LIST_KEYS = ("language", "datasets")
_MAX_TEXT, _MAX_LIST = 200, 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MEASURES = (
    ("kl_per_token", "kl_divergence", "KL(fine-tune || delta), nats per token"),
    ("top1_agreement", "top1_agreement", "most likely token is the fine-tune's"),
)


def own_facts(tuned: Path) -> dict[str, Any]:
    """What the fine-tune's own card states of licence, languages and data sets.

    Empty if it has no card, none that can be read, or none with metadata: cards are free text, and
    no reason to refuse a model.
    """
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    file = tuned / CARD
    try:
        if file.stat().st_size > _MAX_CARD_BYTES:
            return {}
        found = metadata_load(file) or {}
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}
    facts: dict[str, Any] = {key: found[key] for key in _TEXT_KEYS if _is_text(found.get(key))}
    for key in _LIST_KEYS:
        value = found.get(key)
        texts = value if isinstance(value, list) else [value]
        if 0 < len(texts) <= _MAX_LIST and all(map(_is_text, texts)):
            facts[key] = texts
    return facts


def model_card(config: DeltaConfig, n_bytes: int) -> str:
    """Return the card's text.

    n_bytes  of all other files together
    """
    base, name = printable(config.base.name_or_path), printable(config.finetuned)
    return f"""---
{_metadata(config)}
---
# {name}, as a delta of {base}

The fine-tune `{name}` of `{base}`, stored as the compressed difference of their weights
(codec `{config.codec}`): {n_bytes:,} bytes instead of {config.finetuned_bytes:,}, \
{config.finetuned_bytes / n_bytes:.1f} times
smaller. It is no model by itself; the base it was made from is needed, and no other fits:

    impart verify THIS_DIRECTORY --base BASE
    impart reconstruct BASE THIS_DIRECTORY OUT     # an ordinary Hugging Face model
    impart-serve --base BASE --deltas PARENT_DIRECTORY

| | |
|---|---|
{_table(config)}

## Limits

{_limits(config)}

`delta_config.json` has the settings of every tensor, `SHA256SUMS` the checksums.
"""


def _metadata(config: DeltaConfig) -> str:
    from huggingface_hub import ModelCardData

    results = list(_results(config))
    data = ModelCardData(
        base_model=config.base.name_or_path,
        base_model_relation="adapter",
        library_name="impart-serve",
        pipeline_tag="text-generation",
        tags=["impart-delta", "delta-compression", config.codec],
        model_name=config.finetuned if results else None,
        eval_results=results or None,
        **config.finetuned_details.get("card", {}),
    )
    return str(data.to_yaml())


def _results(config: DeltaConfig) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    measured = config.fidelity
    built_in = measured.get("texts") == "built-in"
    for key, metric, title in _MEASURES:
        if key in measured:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="calibration-texts",
                dataset_name=f"{'built-in' if built_in else 'own'} calibration texts",
                metric_type=metric,
                metric_value=measured[key],
                metric_name=title,
            )


def _table(config: DeltaConfig) -> str:
    base, details = config.base, config.finetuned_details
    revision = f" at `{base.revision}`" if base.revision else ""
    asked = f"{config.ratio_requested:g}" if config.ratio_requested else "as large as needed"
    plain = {k: v for k, v in config.options.items() if isinstance(v, str | int | float)}
    settings = ", ".join(f"{key} {value}" for key, value in plain.items())
    rows = {
        "base": f"`{printable(base.name_or_path)}`{revision}{printable(stored_as(base))}",
        "base identity": f"`{base.identity}`",
        "difference from": printable(difference_from(config) or "the base"),
        "fine-tune": f"`{printable(config.finetuned)}`"
        + (f" at `{details['revision']}`" if "revision" in details else ""),
        "codec": f"`{config.codec}`" + (f": {printable(settings)}" if settings else ""),
        "ratio asked for": asked,
        "tensors": f"{len(config.tensors)} stored, {len(config.unchanged)} as in the base",
        "seed": str(config.seed),
        "made by": config.created_by,
    }
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _limits(config: DeltaConfig) -> str:
    return "\n".join(f"- {limit}" for limit in _limit_sentences(config))


def _limit_sentences(config: DeltaConfig) -> Iterator[str]:
    measured = config.fidelity
    if "kl_per_token" in measured:
        yield (
            f"Against the fine-tune on {measured['n_tokens']:,} tokens of calibration text: "
            f"KL {measured['kl_per_token']:.3g} nats per token, "
            f"top-1 agreement {measured['top1_agreement']:.1%}. On other text it may be further "
            "off; `impart eval` measures that."
        )
    else:
        yield (
            "How close it is to the fine-tune was not measured when it was made; `impart eval` "
            "does, on text of your own."
        )
    for line in ignored_settings(config):
        yield f"Not the fine-tune's: {printable(line)}."
    yield "It has the fine-tune's limits and biases besides."
    facts = config.finetuned_details.get("card", {})
    if "license" in facts:
        yield "The licence above is the fine-tune's; the base's terms apply too."
    else:
        yield (
            "No licence was found on the fine-tune's card, so none is stated here. The terms of "
            "the base and of the fine-tune apply."
        )
    if not _HUB_ID.fullmatch(config.base.name_or_path):
        yield (
            "`base_model` is the name of a directory: put the base's Hub id there before this is "
            "published (`--base-name` when compressing)."
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and printable(value) == value
