"""Command line and environment -> Settings. Every field is a flag and an ``IMPART_*`` variable."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from server.errors import ConfigError
from server.settings import Settings

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
HELP = {
    "base": "Base model: a Hugging Face directory.",
    "deltas": "Directory of delta artifacts; a variant's name is its folder's name.",
    "served_base_name": "Name of the base in requests.  [default: its folder's name]",
    "host": "Address to listen on.",
    "port": "Port to listen on.",
    "device": "Where the model runs.",
    "dtype": "Number format of weights; auto: as stored, on CPUs without units for that float32.",
    "widened_weights_bytes": "With --dtype auto: the most that weights may take in float32.  "
    "[default: half of the memory]",
    "kernels": "numba (CPU), triton (CUDA) or plain torch; auto: what fits the device.",
    "base_quant": "Keep the base's linears in 8 bits (lm_head and embeddings stay).",
    "enforce_eager": "Run every step eagerly: no CUDA graphs.",
    "async_scheduling": "With CUDA graphs: launch a step before the last one's tokens are read.",
    "mode": "How variants are served: deltas applied beside the base, or reconstructed weights.",
    "mode_overrides": "VARIANT=MODE for a variant that differs from --mode; may be repeated.",
    "reconstruct_budget_bytes": "Device memory for reconstructed weights of hot variants; 0: none.",
    "delta_budget_bytes": "Device memory for resident deltas; least recently used go first.",
    "max_resident_variants": "Slots for resident variants.",
    "max_variants_per_step": "Distinct variants mixed in one engine step.",
    "kv_cache_bytes": "Device memory for the KV cache.  [default: 1GiB on the CPU, on CUDA what "
    "base and deltas leave]",
    "gpu_memory_utilization": "Share of the GPU's memory to use.",
    "kv_block_tokens": "Tokens per KV cache block.",
    "prefix_cache": "Requests of one variant share the KV blocks of a common beginning.",
    "max_model_len": "Longest prompt plus output.  [default: the base's own limit]",
    "max_num_seqs": "Sequences running at once.",
    "max_batch_tokens": "Tokens per engine step.  [default: 256 on the CPU, 2048 on CUDA]",
    "max_prefill_slowdown": "Longest step while streams run, relative to one without prefill.",
    "long_prefill_token_threshold": "Prompts longer than this are prefilled one at a time, shorter "
    "ones overtake them.  [default: max_batch_tokens]",
    "max_queued_requests": "Sequences waiting; beyond that 503 with Retry-After.",
    "request_timeout_s": "Seconds until a request fails with 504.",
    "drain_timeout_s": "Seconds that running requests get after SIGTERM.",
    "max_body_bytes": "Largest request body.",
    "template_timeout_s": "Seconds that a chat template may take.",
    "heartbeat_timeout_s": "Seconds without a finished layer until the engine counts as hung.",
    "torch_threads": "CPU threads for products.  [default: OMP_NUM_THREADS, or the physical cores "
    "that CPU affinity and the cgroup's limit leave]",
    "log_level": "debug, info, warning, error or critical.",
    "log_format": "Log lines for people or for machines.",
}


def parse_size(text: str | int) -> int:
    """Return bytes from ``4GiB``, ``500MB``, ``1.5 GB`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if match is None or match[2] not in UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write 4GiB, 500MB or a number of bytes")
    return round(float(match[1]) * UNITS[match[2]])


def size_text(n_bytes: int) -> str:
    """Return the shortest exact binary size, so that --help is readable."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if n_bytes and n_bytes % UNITS[unit.lower()] == 0:
            return f"{n_bytes // UNITS[unit.lower()]}{unit}"
    return str(n_bytes)


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """Return ``{"a": "reconstruct"}`` from ``["a=reconstruct"]``."""
    modes = typing.get_args(typing.get_type_hints(Settings)["mode"])
    overrides = {}
    for item in items:
        name, equals, mode = item.partition("=")
        if not equals or not name or mode not in modes:
            raise typer.BadParameter(f"{item!r} is not VARIANT=MODE with MODE {' or '.join(modes)}")
        overrides[name] = mode
    return overrides


def command(serve: Callable[[Settings], None]) -> Callable[..., None]:
    """Return `serve` with one keyword parameter per field of Settings, as typer wants it."""
    hints = typing.get_type_hints(Settings)
    fields = dataclasses.fields(Settings)

    def entry(**values: Any) -> None:
        if "mode_overrides" in values:
            values["mode_overrides"] = parse_overrides(values["mode_overrides"])
        try:
            settings = Settings(**values)
        except ConfigError as error:
            raise typer.BadParameter(error.message) from None
        serve(settings)

    parameters = [_parameter(field, hints[field.name]) for field in fields]
    entry.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    entry.__annotations__ = {p.name: p.annotation for p in parameters}
    entry.__doc__ = "Serve one base model and every delta of a directory over HTTP."
    return entry


def _parameter(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    flag = "--mode-override" if field.name == "mode_overrides" else f"--{_dashed(field.name)}"
    options: dict[str, Any] = {
        "help": HELP.get(field.name),
        "envvar": f"IMPART_{field.name.upper()}",
    }
    default: Any = field.default
    if default is True:
        flag += f"/--no-{_dashed(field.name)}"
    if field.name.endswith("_bytes"):
        options |= {"parser": parse_size, "metavar": "SIZE"}
        default = None if default is None else size_text(default)
    elif field.name == "mode_overrides":
        kind, default = list[str], []
    elif default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(flag, **options)],
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")
