"""Gauges read from the engine and the HTTP layer when Prometheus asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.types import IN_USE, EngineStats, ModelInfo, TenantUse, TextWorkerStats

ENGINE = "0"  # vLLM labels its engines; we have one
LABELS = ("model_name", "engine")
MAX_STATES = 256


class StatsProvider(Protocol):
    """What gauges are read from at scrape time; the engine implements it."""

    base_name: str

    def stats(self) -> EngineStats: ...
    def models_at_work(self) -> Sequence[ModelInfo]: ...
    def text_workers(self) -> TextWorkerStats: ...
    def tenant_use(self) -> Mapping[str, TenantUse]: ...


@dataclass(slots=True)
class SequenceCounts:
    """Sequences of one model that have not ended; changed on the event loop only."""

    waiting: int = 0  # no token yet
    running: int = 0

    def start(self) -> None:
        """The first token of one arrived."""
        self.waiting -= 1
        self.running += 1

    def end(self, *, started: bool) -> None:
        """One ended."""
        if started:
            self.running -= 1
        else:
            self.waiting -= 1


class EngineCollector(Collector):
    """Gauges that are read, not kept.

    The vLLM gauges have one series, named after the base: routers read them as the server's load.
    """

    def __init__(
        self,
        provider: StatsProvider,
        max_resident: int,
        in_flight: Callable[[], Mapping[str, SequenceCounts]],
    ) -> None:
        self._provider = provider
        self._max_resident = max_resident
        self._in_flight = in_flight

    def describe(self) -> list[Metric]:
        return []  # so that registering does not read the engine

    def collect(self) -> Iterator[Metric]:
        variants = self._provider.models_at_work()
        yield from self._load()
        yield from self._text_workers()
        yield from self._in_use([info.name for info in variants if info.resident_bytes])
        yield from self._variants(variants)

    def _load(self) -> Iterator[Metric]:
        stats = self._provider.stats()
        used = 1 - stats.n_free_kv_blocks / stats.n_kv_blocks if stats.n_kv_blocks else 0.0
        values = {
            "vllm:num_requests_running": (stats.n_running, "Requests in the running batch"),
            "vllm:num_requests_waiting": (stats.n_waiting, "Requests waiting"),
            "vllm:kv_cache_usage_perc": (used, "KV cache in use, 0 to 1"),
            "vllm:gpu_cache_usage_perc": (used, "KV cache in use, 0 to 1 (older name)"),
        }
        for name, (value, text) in values.items():
            yield self._gauge(name, text, value)
        yield self._count("vllm:num_preemptions", "Preemptions", stats.n_preemptions)
        queried, hit = stats.n_prefix_queried, stats.n_prefix_hit
        for name in ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"):
            yield self._count(name, "Prompt tokens looked up", queried)
        for name in ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"):  # gpu: the older name
            yield self._count(name, "Prompt tokens found", hit)
        geometry = GaugeMetricFamily(
            "vllm:cache_config_info",
            "1; the KV cache's geometry is in the labels",
            labels=["block_size", "num_gpu_blocks", "engine"],
        )
        geometry.add_metric([str(stats.kv_block_tokens), str(stats.n_kv_blocks), ENGINE], 1)
        yield geometry
        yield self._gauge("impart_base_weight_bytes", "Base weights in memory", stats.base_bytes)
        steps = Metric("impart_decode_steps", "Steps that only decoded, by how they ran", "counter")
        ways = (("graph", stats.n_static_steps), ("eager", stats.n_eager_decode_steps))
        for path, value in ways:
            steps.add_sample("impart_decode_steps_total", self._labels() | {"path": path}, value)
        yield steps
        kernels = GaugeMetricFamily(
            "impart_kernel_state",
            "1 for what the kernels are: compiled, compiling (torch serves meanwhile), uncompiled",
            labels=["state"],
        )
        kernels.add_metric([stats.kernel_state], 1)
        yield kernels

    def _text_workers(self) -> Iterator[Metric]:
        stats = self._provider.text_workers()
        tasks = GaugeMetricFamily(
            "impart_text_tasks", "Work on text that workers do or that waits", labels=["state"]
        )
        tasks.add_metric(["running"], stats.n_busy)
        tasks.add_metric(["waiting"], stats.n_waiting)
        yield tasks
        kills = Metric(
            "impart_text_worker_kills", "Text workers that were ended, by reason", "counter"
        )
        for reason, count in sorted(stats.n_kills.items()):
            kills.add_sample("impart_text_worker_kills_total", {"reason": reason}, count)
        yield kills

    def _in_use(self, resident: Sequence[str]) -> Iterator[Metric]:
        """What gateways route by, with the meaning that their protocol gives to vLLM's series:
        who is in device memory, who is asked for and is not; and the counts.
        """
        counts = self._in_flight()
        elsewhere = {self._provider.base_name, *resident}
        waiting = sorted(name for name, c in counts.items() if c.waiting and name not in elsewhere)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Variants in device memory, and those asked for that are not; the value is the time of "
            "this scrape",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [str(self._max_resident), ",".join(sorted(resident)), ",".join(waiting)]
        info.add_metric(labels, time.time())
        yield info
        sequences = GaugeMetricFamily(
            "impart_sequences", "Sequences in flight", labels=["model_name", "phase"]
        )
        for name, count in counts.items():
            sequences.add_metric([name, "running"], count.running)
            sequences.add_metric([name, "waiting"], count.waiting)
        yield sequences

    def _variants(self, variants: Sequence[ModelInfo]) -> Iterator[Metric]:
        resident = GaugeMetricFamily(
            "impart_variant_resident_bytes",
            "Device memory held by a variant's deltas",
            labels=["model_name"],
        )
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "Variants in device memory",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        reconstructed = GaugeMetricFamily(
            "impart_reconstructed_bytes",
            "Device memory held by a hot variant's reconstructed weights",
            labels=["model_name"],
        )
        for info in variants:
            if info.reconstructed_bytes:
                reconstructed.add_metric([info.name], info.reconstructed_bytes)
            if info.resident_bytes:
                resident.add_metric([info.name], info.resident_bytes)
                loaded.add_metric([info.name, "gpu", str(info.pinned).lower(), "0"], 1)
        yield resident
        yield reconstructed
        yield loaded
        yield self._states(variants)
        n_resident = sum(1 for info in variants if info.resident_bytes)
        yield self._gauge("vllm:num_gpu_loaded_lora_adapters", "Resident variants", n_resident)
        most = self._max_resident
        yield self._gauge("vllm:max_gpu_lora_adapters", "Most variants that can be resident", most)

    def _states(self, variants: Sequence[ModelInfo]) -> Metric:
        """1 for the state a variant is in; none for variants that are merely registered, and for no
        more than `MAX_STATES`, those in use first.
        """
        family = GaugeMetricFamily(
            "impart_variant_state", "State of each variant in use", labels=["model_name", "state"]
        )
        in_use = [info for info in variants if info.state in IN_USE]
        failed = [info for info in variants if info.state == "failed"]
        for info in (in_use + failed)[:MAX_STATES]:
            family.add_metric([info.name, info.state], 1)
        return family

    def _labels(self) -> dict[str, str]:
        return {"model_name": self._provider.base_name, "engine": ENGINE}

    def _count(self, name: str, text: str, value: int) -> Metric:
        counter = Metric(name, f"{text} since the start", "counter")
        counter.add_sample(f"{name}_total", self._labels(), value)
        return counter

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(list(self._labels().values()), value)
        return family
