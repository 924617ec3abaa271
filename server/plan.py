"""``python -m server.plan BASE DELTA...``: what ``impart plan`` starts.

Reckons by headers and configurations alone: nothing is loaded. Exit codes: 0 it fits, 1 it does
not, 2 bad input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.errors import ImpartError
from server.errors import ConfigError
from server.setting_kinds import GIB, parse_size

REFUSED, BAD_INPUT = 1, 2
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATIONS = 0.1  # of the memory, as `gpu_memory_utilization` leaves
SLACK = 1.25  # arrays of deltas may be so much larger than what they hold: see `places.slack`


def plan_offline(
    base: str,
    deltas: Annotated[list[Path], typer.Argument()],
    memory: Annotated[str, typer.Option()],
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Print what everything takes, and what is left for the KV cache."""
    from compressor.artifact.identity import base_identity
    from compressor.artifact.reader import describe_artifact
    from compressor.checkpoint.folder import read_model_config, resolve
    from server.deltas.footprint import expected_bytes
    from server.process.inputs import stored_model

    try:
        total = parse_size(memory)
        assert isinstance(total, int)
        folder = resolve(base)
        stored, config = stored_model(folder), read_model_config(folder)
        identity, width = base_identity(folder), WIDTHS.get(stored.dtype, 2)
        sizes = {
            delta: expected_bytes(describe_artifact(delta, base_identity=identity).config, width)
            for delta in deltas
        }
        token_bytes = kv_bytes_per_token(config, width)
    except (ImpartError, ConfigError, ValueError) as error:
        raise _ended(f"error: {error}", BAD_INPUT) from None
    base_bytes = stored.n_parameters * width
    all_deltas = round(SLACK * sum(sizes.values()))
    kept = round(ACTIVATIONS * total)
    left = total - base_bytes - all_deltas - kept
    typer.echo(f"base                 {_gib(base_bytes)}  {stored.n_parameters:,} parameters")
    for delta, n_bytes in sizes.items():
        typer.echo(f"delta                {_gib(n_bytes)}  {delta.name}")
    typer.echo(f"all deltas           {_gib(all_deltas)}  with room for their arrays to grow")
    typer.echo(f"kept free            {_gib(kept)}  activations and graphs")
    longest = max_model_len or _positions(config)
    if left < token_bytes * longest:
        raise _ended(
            f"it does not fit into {_gib(total).strip()}: {_gib(left).strip()} are left for the KV "
            f"cache, and one request of {longest:,} tokens needs "
            f"{_gib(token_bytes * longest).strip()}; take fewer deltas, more memory or a lower "
            "--max-model-len",
            REFUSED,
        )
    n_tokens = left // token_bytes
    typer.echo(
        f"left for KV          {_gib(left)}  {n_tokens:,} tokens, {n_tokens // longest} requests "
        f"of {longest:,}"
    )
    typer.echo("times: a running server measures them (GET /v1/capacity)")


def kv_bytes_per_token(config: dict[str, Any], width: int) -> int:
    """Keys and values of all layers, by the usual names. Raises ConfigError without them."""
    text = config.get("text_config")
    found = {**config, **text} if isinstance(text, dict) else config
    layers: Any = found.get("num_hidden_layers", found.get("n_layer"))
    heads: Any = found.get("num_attention_heads", found.get("n_head"))
    hidden: Any = found.get("hidden_size", found.get("n_embd"))
    if not all(type(value) is int and value > 0 for value in (layers, heads, hidden)):
        raise ConfigError("the base's config.json does not say its layers, heads and width")
    kv_heads = found.get("num_key_value_heads") or heads
    head_dim = found.get("head_dim") or hidden // heads
    return int(2 * layers * kv_heads * head_dim * width)


def _positions(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    found = {**config, **text} if isinstance(text, dict) else config
    return int(found.get("max_position_embeddings") or found.get("n_positions") or 2048)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:9.3f} GiB"


def _ended(message: str, code: int) -> typer.Exit:
    typer.echo(f"impart: {message}", err=True)
    return typer.Exit(code)


if __name__ == "__main__":
    typer.run(plan_offline)
