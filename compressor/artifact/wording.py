"""The free parts of a configuration for people: what `auto` tried and chose, what was measured.

They are data from a stranger: what is not of the expected form is left out, or shown as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from compressor.artifact.certificate import Certificate
from compressor.artifact.config import BaseInfo, DeltaConfig

AUTO = "auto"
# Beside a relative error, which says little by itself.
ERROR_MEANS = "size of what is wrong over size of the difference; sampling is above 1 by design"

_MAX_SHOWN = 20  # settings of one kind
_MAX_CHARS = 200  # of one value


def plain_settings(options: dict[str, Any]) -> str:
    """What was set, as ``bits 4, head_bits 4``; what `auto` tells of itself is left out."""
    own = {key: value for key, value in options.items() if key != AUTO}
    shown = [f"{key} {_short(value)}" for key, value in list(own.items())[:_MAX_SHOWN]]
    return ", ".join(shown + ["…"] * (len(own) > _MAX_SHOWN)) or "none"


def stored_as(base: BaseInfo) -> str:
    """What follows the base's name where its weights are stored quantised."""
    return "" if base.quantisation is None else f", stored as {base.quantisation}"


def difference_from(config: DeltaConfig) -> str | None:
    """What the fine-tune was compared with where that is not the base: its name and identity."""
    record = config.finetuned_details.get("difference_from")
    if not isinstance(record, dict):
        return None
    name, identity = _short(record.get("name_or_path")), _short(record.get("identity"))
    return f"{name} (identity {identity}), not from the base as it is stored"


def choice(config: DeltaConfig) -> Iterator[tuple[str, str]]:
    """Yield what `auto` chose by, what it chose and what else it tried, each with a heading;
    nothing if settings were given.
    """
    record = config.options.get(AUTO)
    if not isinstance(record, dict):
        return
    yield "chosen by", f"auto: {_short(record.get('basis', ''))}"
    chosen: list[str] = []
    others: list[str] = []
    tried = record.get("tried")
    for trial in tried[:_MAX_SHOWN] if isinstance(tried, list) else []:
        told = _trial(trial)
        if told is not None:
            is_chosen = (trial.get("setting"), trial.get("ratio")) == (
                record.get("chosen"),
                config.ratio_requested,
            )
            (chosen if is_chosen else others).append(told)
    yield from (("chosen", told) for told in chosen)
    tuned = record.get("tuned")
    if isinstance(tuned, dict):
        yield "then tuned", f"norms and biases, {tuned.get('steps')} of {tuned.get('of')} steps"
    rescaled = record.get("rescaled")
    if isinstance(rescaled, dict):
        yield "then rescaled", ", ".join(f"{name} by {by}" for name, by in rescaled.items())
    yield from (("also tried" if chosen else "tried", told) for told in others)
    base_kl = _kl(record.get("base_kl"))
    if base_kl is not None:
        yield "without a delta", f"the base itself has KL {base_kl}"


def measured(fidelity: dict[str, Any]) -> list[str]:
    """What was recorded when the artifact was made, a line for each set of texts."""
    first = _measured(fidelity, fidelity.get("texts"))
    rest = {
        name: _measured(part, name) for name, part in fidelity.items() if isinstance(part, dict)
    }
    return [line for line in (first, *rest.values()) if line is not None]


def certified(certificate: Certificate | None) -> str:
    """What an artifact's certificate says, in a line."""
    if certificate is None:
        return "none (impart certify adds one)"
    return (
        f"{len(certificate.prompts)} prompts from {certificate.texts} texts, "
        f"{certificate.n_tokens} tokens: KL {certificate.kl_per_token:.4g} nats per token, "
        f"agreement {certificate.top1_agreement:.2%} "
        f"(of the base {certificate.base_kl_per_token:.4g} and "
        f"{certificate.base_top1_agreement:.2%})"
    )


def unknown(fidelity: dict[str, Any]) -> dict[str, Any]:
    """What of the record `measured` does not tell."""
    known = {"kl_per_token", "top1_agreement", "n_tokens", "n_texts", "texts"}
    return {
        key: value
        for key, value in fidelity.items()
        if key not in known and not (isinstance(value, dict) and _measured(value, key))
    }


def _measured(record: dict[str, Any], texts: Any) -> str | None:
    kl, agreement = record.get("kl_per_token"), record.get("top1_agreement")
    if not _is_number(kl) or not _is_number(agreement):
        return None
    of = f" of {texts} texts" if isinstance(texts, str) else ""
    n_tokens = record.get("n_tokens")
    on = f" ({n_tokens:,} tokens{of})" if _is_number(n_tokens) else of
    return f"KL {kl:.4g} nats per token, top-1 agreement {agreement:.2%}{on}"


def _trial(trial: Any) -> str | None:
    kl = _kl(trial.get("kl")) if isinstance(trial, dict) else None
    return None if kl is None else f"{trial.get('setting')} at ratio {trial.get('ratio')}: KL {kl}"


def _kl(record: Any) -> str | None:
    if not isinstance(record, dict) or not all(map(_is_number, record.values())):
        return None
    return ", ".join(f"{value:.4g} on {name} texts" for name, value in record.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 1] + "…"


def ignored_settings(config: DeltaConfig) -> Iterator[str]:
    """Yield the settings of the fine-tune's config.json that the user let be the base's."""
    ignored = config.finetuned_details.get("ignored_config")
    if isinstance(ignored, dict):
        for key, value in list(ignored.items())[:_MAX_SHOWN]:
            yield f"{_short(key)}, {_short(value)} in its own config.json, is the base's"
