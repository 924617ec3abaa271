"""The model card: ``README.md`` with the metadata the Hugging Face Hub reads."""

from __future__ import annotations

import json

from compressor.artifact_config import DeltaConfig


def model_card(config: DeltaConfig, n_bytes: int | None) -> str:
    """Return the card's text.

    n_bytes  of all other files together; None while planning, where a number of usual length
             stands in
    """
    base, name = config.base.name_or_path, config.finetuned
    size = n_bytes if n_bytes is not None else 10_000_000
    ratio = config.finetuned_bytes / size
    front = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "impart-serve",
        "pipeline_tag": "text-generation",
        "tags": ["impart-delta", "delta-compression", config.codec],
    }
    metadata = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"""---
{metadata}
---
# {name}, as a delta of {base}

The fine-tune `{name}` of `{base}`, stored as the compressed difference of their weights
(codec `{config.codec}`): {size:,} bytes instead of {config.finetuned_bytes:,}, {ratio:.1f} times
smaller. It is no model by itself; the base it was made from is needed, and no other fits:

    impart verify THIS_DIRECTORY --base BASE
    impart reconstruct BASE THIS_DIRECTORY OUT     # an ordinary Hugging Face model
    impart-serve --base BASE --deltas PARENT_DIRECTORY

Base identity: `{config.base.identity}`.
{_fidelity(config)}The licences of the base model and of the fine-tune's data apply to it.
`delta_config.json` has the settings of every tensor, `SHA256SUMS` the checksums.
"""


def _fidelity(config: DeltaConfig) -> str:
    measured = config.fidelity
    if "kl_per_token" not in measured:
        return ""
    return (
        f"Against the fine-tune on {measured['n_tokens']:,} tokens of calibration text: "
        f"KL {measured['kl_per_token']:.3g} nats per token, "
        f"top-1 agreement {measured['top1_agreement']:.1%}.\n"
    )
