"""All server settings, each told once: name, type, default, bounds and what it is.

The flags of ``impart-serve``, the ``IMPART_*`` variables, ``--help`` and the settings table of the
documentation are made from this class. It is checked by pydantic whenever it is made, and it is
frozen. To its readers it is a plain dataclass: the engine needs nothing of pydantic.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from server.errors import ConfigError
from server.setting_kinds import (
    GIB,
    Bytes,
    Count,
    Key,
    KeyFiles,
    Mode,
    Overrides,
    Prefixes,
    Ratio,
    Seconds,
    Tokens,
    Url,
    WhenUnset,
    size_text,
)

# The first setting of each group, in the order of `Settings`, and the group's heading in --help.
GROUPS = {
    "base": "Models",
    "host": "Address",
    "tenants": "Tenants",
    "device": "Device and kernels",
    "mode": "Variants",
    "kv_cache_bytes": "Memory for the KV cache",
    "max_model_len": "Batches",
    "max_queued_requests": "Requests",
    "heartbeat_timeout_s": "Process and log",
}
# What pydantic calls a broken rule, and how we say it.
SENTENCES = {
    "missing": "is required",
    "unexpected_keyword_argument": "is not a setting",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
}


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Settings:
    """How one server runs."""

    base: Path = Field(
        description="Base model: a Hugging Face directory, quantised or not, a GGUF file, or a "
        "Hub id org/name[@revision]."
    )
    base_revision: Annotated[str | None, WhenUnset("none")] = Field(
        default=None, description="Branch, tag or commit, if the base is a Hub id."
    )
    deltas: Annotated[Path | None, WhenUnset("none")] = Field(
        default=None,
        description="Folder of delta artifacts; a variant's name is its folder's name.",
    )
    watch_deltas: bool = Field(
        default=True, description="Read the folder of deltas again when something in it changed."
    )
    allow_sources: Prefixes = Field(
        default=(),
        description="Where variants may come from over HTTP: a folder, hf://org, "
        "s3://bucket/prefix, gs://, az://, https://host/prefix; the flag may be repeated, the "
        "variable takes several with spaces between.",
    )
    disk_budget_bytes: Bytes = Field(
        default=100 * GIB,
        gt=0,
        description="Disk space for variants that were fetched, uploaded or converted "
        "(state_dir/deltas).",
    )
    max_artifact_bytes: Bytes = Field(
        default=16 * GIB, gt=0, description="Largest artifact that is fetched or uploaded."
    )
    served_base_name: Annotated[str | None, WhenUnset("the folder's name, or the Hub id")] = Field(
        default=None, description="Name of the base in requests."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Count = Field(default=8000, ge=0, le=65535, description="Port to listen on.")
    tenants: Annotated[Path | None, WhenUnset("none")] = Field(
        default=None,
        description="File of the tenants (TOML or YAML): their keys, variants, limits and weights; "
        "read again on SIGHUP.",
    )
    api_key: Annotated[Key | None, WhenUnset("none")] = Field(
        default=None,
        description="Key of the one tenant of a server without --tenants; better given as a "
        "variable, since a flag is seen by whoever lists processes.",
    )
    admin_key: Annotated[Key | None, WhenUnset("none")] = Field(
        default=None,
        description="Key of the admin routes, which change the server or show all tenants.",
    )
    admin_host: str = Field(
        default="127.0.0.1", description="Address of the admin routes, with an admin key."
    )
    admin_port: Annotated[Count | None, WhenUnset("port + 1")] = Field(
        default=None, ge=0, le=65535, description="Port of the admin routes, with an admin key."
    )
    insecure_no_auth: bool = Field(
        default=False,
        description="Serve whoever reaches the port, without any key, also beyond this machine.",
    )
    tenant_header: Annotated[str | None, WhenUnset("none")] = Field(
        default=None,
        description="Header in which a trusted proxy names the tenant, e.g. x-tenant.",
    )
    trusted_proxy_key: Annotated[Key | None, WhenUnset("none")] = Field(
        default=None, description="Key of the proxy whose --tenant-header is believed."
    )
    limits_storage: Url = Field(
        default=SecretStr("memory://"),
        description="Where rates are counted: memory://, or redis://HOST:PORT for several servers "
        "together.",
    )
    limits_fail_open: bool = Field(
        default=False,
        description="Admit requests while the storage of the limits cannot be reached, instead of "
        "refusing them.",
    )
    scheduling_policy: Literal["fair", "priority", "fcfs"] = Field(
        default="fair",
        description="Who is served next: fair shares by the tenants' weights; by the requests' "
        "priority; or who came first.",
    )
    state_dir: Annotated[Path | None, WhenUnset("none")] = Field(
        default=None,
        description="Folder of what outlives the server: the ledger of requests, quotas, the audit "
        "log.",
    )
    ledger_url: Annotated[Url | None, WhenUnset("SQLite in state_dir")] = Field(
        default=None, description="Database of the ledger, as SQLAlchemy writes it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of weights; auto: as stored, but float32 on a CPU without "
        "units for that (the same values, several times as fast).",
    )
    widened_weights_bytes: Annotated[Bytes | None, WhenUnset("half of the memory")] = Field(
        default=None,
        gt=0,
        description="With --dtype auto: the most that weights may take in float32.",
    )
    kernels: Literal["auto", "torch", "numba", "triton"] = Field(
        default="auto",
        description="auto: numba (compiled for the CPU) or triton (CUDA), else plain torch.",
    )
    compile_kernels: Literal["background", "wait", "never"] = Field(
        default="background",
        description="When CPU kernels are compiled that never were on this kind of machine. "
        "background: torch serves meanwhile, slower; wait: before serving; never: torch does "
        "their work.",
    )
    base_quant: Literal["none", "int8", "float8"] = Field(
        default="none",
        description="Keep the base's linears in 8 bits (lm_head and embeddings stay).",
    )
    self_check: bool = Field(
        default=True,
        description="Compare the engine with the model's own definition before serving, on a few "
        "dozen tokens; a base that differs is refused, and the layer named.",
    )
    enforce_eager: bool = Field(
        default=False, description="Run every step eagerly: no CUDA graphs."
    )
    async_scheduling: bool = Field(
        default=True,
        description="With CUDA graphs: launch a decode step before the last one's tokens are read.",
    )
    mode: Mode = Field(
        default="apply",
        description="Apply deltas beside the base, or reconstruct full weights for each variant.",
    )
    mode_overrides: Overrides = Field(
        default_factory=dict,
        description="Mode of a variant that differs from --mode; the flag may be repeated, the "
        "variable takes several with spaces between.",
    )
    reconstruct_budget_bytes: Bytes = Field(
        default=0, ge=0, description="Device memory for full weights of hot variants; 0: none."
    )
    delta_budget_bytes: Bytes = Field(
        default=4 * GIB,
        gt=0,
        description="Device memory for resident deltas; what is missed least goes first.",
    )
    host_delta_budget_bytes: Bytes = Field(
        default=0,
        ge=0,
        description="Host memory for decoded variants, resident ones included, so that coming back "
        "is a copy; 0: none.",
    )
    max_resident_variants: Count = Field(
        default=64, gt=0, description="Slots for resident variants."
    )
    require_signature: KeyFiles = Field(
        default=(),
        description="Public key that a variant's artifact must be signed by; the flag may be "
        "repeated, then by one of them; the variable takes several with spaces between.",
    )
    verify_on_load: Annotated[Ratio | None, WhenUnset("none")] = Field(
        default=None,
        ge=0,
        le=1,
        description="Agreement with its certificate's tokens that a variant must reach before it "
        "is first served; one below it, or without a certificate, is refused.",
    )
    max_variants_per_step: Count = Field(
        default=32, gt=0, description="Distinct variants mixed in one engine step."
    )
    kv_cache_bytes: Annotated[
        Bytes | None, WhenUnset("1GiB on the CPU; on CUDA what base and deltas leave")
    ] = Field(default=None, gt=0, description="Device memory for the KV cache.")
    gpu_memory_utilization: Ratio = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the GPU's memory for base, deltas and KV cache; the rest is for "
        "activations and graphs.",
    )
    kv_block_tokens: Tokens = Field(default=16, gt=0, description="Tokens of one KV block.")
    prefix_cache: bool = Field(
        default=True,
        description="Requests of one variant and cache_salt share the KV blocks of a common "
        "beginning.",
    )
    max_model_len: Annotated[Tokens | None, WhenUnset("the base's own limit")] = Field(
        default=None, description="Longest prompt plus output."
    )
    max_num_seqs: Count = Field(default=64, gt=0, description="Sequences that run at once.")
    max_batch_tokens: Annotated[Tokens | None, WhenUnset("256 on the CPU, 2048 on CUDA")] = Field(
        default=None,
        gt=0,
        description="Tokens of one engine step: decode first, then prefill chunks.",
    )
    max_prefill_slowdown: Ratio = Field(
        default=2.0,
        description="Longest step while streams run, relative to one without prefill (p99 / p50 of "
        "the time between tokens stays below it); 0: no limit.",
    )
    long_prefill_token_threshold: Annotated[Tokens | None, WhenUnset("max_batch_tokens")] = Field(
        default=None,
        gt=0,
        description="Longer prompts are prefilled one at a time, shorter ones overtake them.",
    )
    max_queued_requests: Count = Field(
        default=256, gt=0, description="Sequences that wait; more get 503 and Retry-After."
    )
    request_timeout_s: Seconds = Field(
        default=300.0, gt=0, description="Time after which a request fails with 504."
    )
    drain_timeout_s: Seconds = Field(
        default=30.0, ge=0, description="Time that running requests get after SIGTERM."
    )
    max_body_bytes: Bytes = Field(default=4 << 20, gt=0, description="Largest request body.")
    text_workers: Count = Field(
        default=2,
        gt=0,
        description="Processes for chat templates, long texts and tokenizers of variants; with one "
        "alone, a variant's text can hold up others'.",
    )
    text_worker_memory_bytes: Bytes = Field(
        default=GIB,
        ge=256 << 20,
        description="Address space of one text worker; one that needs more is replaced.",
    )
    text_task_cpu_s: Seconds = Field(
        default=5.0,
        gt=0,
        description="Processor time that work on one text may take; loading a tokenizer may take "
        "four times as much.",
    )
    text_task_timeout_s: Seconds = Field(
        default=60.0,
        gt=0,
        description="Time that work on one text may take, waiting for a text worker not counted.",
    )
    allow_special_tokens_in_content: bool = Field(
        default=False,
        description="Control tokens in the content of messages end and begin turns, as if the "
        "template had written them.",
    )
    heartbeat_timeout_s: Seconds = Field(
        default=10.0,
        ge=1,  # an idle engine beats twice per second
        description="Time without a finished layer until the engine counts as hung.",
    )
    torch_threads: Annotated[
        Count | None,
        WhenUnset("OMP_NUM_THREADS, or the cores that CPU affinity and the cgroup's limit leave"),
    ] = Field(default=None, gt=0, description="CPU threads for products.")
    log_level: str = Field(default="info", description="debug, info, warning, error or critical.")
    log_format: Literal["plain", "json"] = Field(
        default="plain", description="Log lines for people or for machines."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_sentences(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError("; ".join(map(_sentence, error.errors()))) from None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_prefill_slowdown != 0 and not 1 < self.max_prefill_slowdown < math.inf:
            raise ConfigError(
                f"max_prefill_slowdown must be above 1, or 0 for no limit, "
                f"got {self.max_prefill_slowdown}"
            )
        if (self.kernels, self.device) in (("triton", "cpu"), ("numba", "cuda")):
            raise ConfigError(
                f"{self.kernels} kernels do not run with device {self.device}; use kernels auto"
            )
        reconstructs = "reconstruct" in (self.mode, *self.mode_overrides.values())
        if self.base_quant != "none" and (reconstructs or self.reconstruct_budget_bytes):
            raise ConfigError(
                "weights cannot be reconstructed from an 8-bit base: use mode apply without a "
                "reconstruct budget, or base_quant none"
            )
        return self


def is_shared(settings: Settings) -> bool:
    """Whether several servers count together what tenants use."""
    return not settings.limits_storage.get_secret_value().startswith("memory:")


def keeps_quotas(settings: Settings) -> bool:
    """Whether what was used in a day or month outlives the server."""
    has_ledger = settings.state_dir is not None or settings.ledger_url is not None
    return has_ledger or is_shared(settings)


def check_kv_cache(settings: Settings, host_bytes: int) -> None:
    """Raise ConfigError where the cache asked for, in a CPU's memory, is more than that holds.

    host_bytes  what this process may still take
    """
    asked = settings.kv_cache_bytes
    if asked is not None and asked > host_bytes:
        raise ConfigError(
            f"kv_cache_bytes is {size_text(asked)}, but this process may take no more than "
            f"{host_bytes / GIB:.1f} GiB of memory; lower it"
        )


def check_max_model_len(settings: Settings, n_positions: int) -> None:
    """Raise ConfigError where the base has not so many positions."""
    asked = settings.max_model_len
    if asked is not None and asked > n_positions:
        raise ConfigError(
            f"max_model_len is {asked}, but the base model has positions for {n_positions} tokens "
            "only; lower it"
        )


def _sentence(error: Any) -> str:
    """One broken rule with subject and verb: ``port must be at most 65535, got 70000``."""
    name = ".".join(str(part) for part in error["loc"])
    rule, given = error["type"], error["input"]
    if rule == "value_error":
        return f"{name}: {error['ctx']['error']}"
    if rule in ("missing", "unexpected_keyword_argument"):
        return f"{name} {SENTENCES[rule]}"
    says = SENTENCES.get(rule)
    return f"{name} {says.format(**error.get('ctx', {})) if says else error['msg']}, got {given!r}"
