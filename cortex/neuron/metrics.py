"""The neuron's Prometheus metrics.

Counters and histograms are fed per request, never per token; gauges are read from the
lifecycle when they are scraped, so that a model that is gone leaves none behind.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cortex.core.neuron_api import MODEL_STATUSES, DeviceHealth, ModelLoad

DURATION_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
TTFT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
RATE_BUCKETS = (1, 2.5, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """What one request took.

    Attributes:
        ttft_s: from arrival to the first content token; None if there was none.
        decode_s: from the first to the last token.
    """

    duration_s: float
    ttft_s: float | None
    decode_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GaugeSnapshot:
    """What the gauges show at one moment.

    Attributes:
        unaccounted: by GPU, bytes in use beyond what models hold there.
    """

    statuses: dict[str, str]
    models: list[ModelLoad]
    devices: list[DeviceHealth]
    unaccounted: dict[int, int]


class _Gauges(Collector):
    def __init__(self, read: Callable[[], GaugeSnapshot]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges of this moment."""
        snapshot = self._read()
        yield _status_gauge(snapshot.statuses)
        yield from _model_gauges(snapshot.models)
        yield from _device_gauges(snapshot.devices)
        yield _unaccounted_gauge(snapshot.unaccounted)


def _status_gauge(statuses: dict[str, str]) -> Metric:
    gauge = GaugeMetricFamily(
        "cortex_neuron_model_status", "1 for the status a model is in", labels=["model", "status"]
    )
    for model_id, current in statuses.items():
        for status in sorted(MODEL_STATUSES):
            gauge.add_metric([model_id, status], float(status == current))
    return gauge


_MODEL_GAUGES = {
    "in_flight": "Sequences that hold a seat",
    "queue_depth": "Requests that wait for a seat",
    "max_in_flight": "Seats",
    "max_queue_depth": "Requests that may wait",
    "free_slots": "State slots of the engine that are free",
    "free_kv_blocks": "KV blocks of the engine that are free",
    "cached_kv_blocks": "Free KV blocks whose content prompts can go on from",
    "kept_states": "States of hybrid models that prompts can go on from",
    "total_kv_blocks": "KV blocks of the engine",
    "tok_s_prefill": "Prefilled tokens per second",
    "tok_s_decode": "Decoded tokens per second",
}
_DEVICE_GAUGES = {
    "vram_used_mb": "Device memory in use, MiB",
    "vram_free_mb": "Device memory free, MiB",
    "utilization_pct": "Device utilisation",
    "temp_c": "Device temperature",
}


def _model_gauges(models: list[ModelLoad]) -> Iterator[Metric]:
    for name, text in _MODEL_GAUGES.items():
        gauge = GaugeMetricFamily(f"cortex_neuron_{name}", text, labels=["model"])
        for each in models:
            gauge.add_metric([each.id], float(getattr(each, name)))
        yield gauge


def _device_gauges(devices: list[DeviceHealth]) -> Iterator[Metric]:
    for name, text in _DEVICE_GAUGES.items():
        gauge = GaugeMetricFamily(f"cortex_neuron_device_{name}", text, labels=["device"])
        for each in devices:
            gauge.add_metric([str(each.index)], float(getattr(each, name)))
        yield gauge


def _unaccounted_gauge(unaccounted: dict[int, int]) -> Metric:
    gauge = GaugeMetricFamily(
        "cortex_neuron_device_unaccounted_bytes",
        "Device memory in use beyond what models hold, negative if they hold more",
        labels=["device"],
    )
    for index, num_bytes in unaccounted.items():
        gauge.add_metric([str(index)], float(num_bytes))
    return gauge


class Metrics:
    """All metrics of one neuron, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests for a loaded model")
        self._errors = self._counter("request_errors", "Requests that ended in an error", "code")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens")
        self._completion = self._counter("completion_tokens", "Generated tokens")
        self._cached = self._counter("cached_prompt_tokens", "Prompt tokens found in a cache")
        self._hits = self._counter("prefix_hits", "Requests whose prompt was cached in part")
        self._evictions = self._counter("evictions", "Models ended to make room for another")
        self._idle_unloads = self._counter("idle_unloads", "Models unloaded for idleness")
        self._recycles = self._counter("recycles", "Engines ended and started again on request")
        self._engine_losses = self._counter(
            "engine_losses", "Engines that failed to load or ended unasked", "status"
        )
        self._duration = self._histogram(
            "request_duration_seconds", "Arrival to the last token", DURATION_BUCKETS
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Arrival to the first content token", TTFT_BUCKETS
        )
        self._rate = self._histogram(
            "tokens_per_second", "Tokens per second after the first", RATE_BUCKETS
        )
        self._load = self._histogram("load_seconds", "Time a load took", DURATION_BUCKETS)

    def show(self, read: Callable[[], GaugeSnapshot]) -> None:
        """Have the gauges read from `read` at every scrape."""
        self._registry.register(_Gauges(read))

    def request_ended(self, model_id: str, timing: RequestTiming) -> None:
        """Count a request that was answered."""
        self._requests.labels(model_id).inc()
        self._prompt.labels(model_id).inc(timing.prompt_tokens)
        self._completion.labels(model_id).inc(timing.completion_tokens)
        self._cached.labels(model_id).inc(timing.cached_tokens)
        self._hits.labels(model_id).inc(timing.cached_tokens > 0)
        self._duration.labels(model_id).observe(timing.duration_s)
        if timing.ttft_s is not None:
            self._ttft.labels(model_id).observe(timing.ttft_s)
        if timing.completion_tokens > 1 and timing.decode_s > 0:
            self._rate.labels(model_id).observe((timing.completion_tokens - 1) / timing.decode_s)

    def request_failed(self, model_id: str, code: str) -> None:
        """Count a request that ended in an error."""
        self._requests.labels(model_id).inc()
        self._errors.labels(model_id, code).inc()

    def load_ended(self, model_id: str, load_s: float) -> None:
        """Record a load that succeeded."""
        self._load.labels(model_id).observe(load_s)

    def engine_lost(self, model_id: str, status: str) -> None:
        """Count an engine that failed, by the status its model was in."""
        self._engine_losses.labels(model_id, status).inc()

    def evicted(self, model_id: str) -> None:
        """Count a model that made room."""
        self._evictions.labels(model_id).inc()

    def idle_unloaded(self, model_id: str) -> None:
        """Count a model whose TTL was over."""
        self._idle_unloads.labels(model_id).inc()

    def recycled(self, model_id: str) -> None:
        """Count an engine that made way for a fresh one."""
        self._recycles.labels(model_id).inc()

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"cortex_neuron_{name}", text, ["model", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"cortex_neuron_{name}", text, ["model"], buckets=buckets, registry=self._registry
        )
