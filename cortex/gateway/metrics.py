"""Prometheus metrics: counted once per request, gauges read from the fleet at every scrape."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cortex.core.build import version
from cortex.gateway.fleet import Fleet, NodeView
from cortex.gateway.usage import ModelUsage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

DURATION_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
TTFT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
TOKEN_RATE_BUCKETS = (1, 2.5, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)

# Keys times models that get series of their own; keys come and go with the configuration.
MAX_KEY_SERIES = 5000
OTHER_MODELS = "other"

_LABELS = ("model", "node")
_REJECTIONS = (("queue_full", "rejected_queue_full"), ("wait_timeout", "rejected_timeout"))
_MODEL_GAUGES = (
    ("cortex_model_in_flight", "Requests a model is working on.", "in_flight"),
    ("cortex_model_queue_depth", "Requests waiting for a model.", "queue_depth"),
    ("cortex_model_max_in_flight", "Requests a model takes at once.", "max_in_flight"),
    ("cortex_model_max_queue_depth", "Requests a model lets wait.", "max_queue_depth"),
    ("cortex_model_tok_s_prefill", "Measured prompt tokens per second.", "tok_s_prefill"),
    ("cortex_model_tok_s_decode", "Measured answer tokens per second.", "tok_s_decode"),
)
_NODE_GAUGES: tuple[tuple[str, str, Callable[[NodeView], bool]], ...] = (
    (
        "cortex_node_breaker_open",
        "Whether requests are kept away from a node because they failed there.",
        lambda node: node.breaker.state != "closed",
    ),
    (
        "cortex_node_draining",
        "Whether a node takes nothing new, by its own word or the operator's.",
        lambda node: node.draining,
    ),
    (
        "cortex_node_subscribed",
        "Whether a node's events come in; otherwise it is polled.",
        lambda node: node.subscribed,
    ),
)
_DEVICE_GAUGES = (
    ("cortex_device_vram_used_mb", "Device memory in use, MiB.", "vram_used_mb"),
    ("cortex_device_vram_free_mb", "Device memory free, MiB.", "vram_free_mb"),
    ("cortex_device_utilization_pct", "Device utilisation, percent.", "utilization_pct"),
    ("cortex_device_temp_c", "Device temperature, Celsius.", "temp_c"),
)


@dataclass(slots=True, kw_only=True)
class RequestTiming:
    """What one request came to; filled in as it goes, counted once at its end.

    Attributes:
        node: where it ran, empty when it never got that far.
        account, key: whom its tokens are counted for, empty without a known key.
        duration_s: from arrival to the last byte.
        ttft_s: from arrival to the first content token of a stream, None elsewhere.
        decode_s: from the first content token to the last byte of a stream.
        failed: it ended in an error, before or after the first byte.
    """

    model: str
    node: str = ""
    account: str = ""
    key: str = ""
    duration_s: float = 0.0
    ttft_s: float | None = None
    decode_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    failed: bool = False


class Metrics:
    """The gateway's own registry."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("cortex_requests", "Requests that named a model.")
        self._errors = self._counter(
            "cortex_request_errors", "Requests that ended in an error; node is empty if unrouted."
        )
        self._cold_starts = self._counter(
            "cortex_cold_starts", "Loads this gateway began because a request came."
        )
        self._prompt_tokens = self._counter("cortex_prompt_tokens", "Prompt tokens.")
        self._completion_tokens = self._counter("cortex_completion_tokens", "Answer tokens.")
        self._cached_tokens = self._counter(
            "cortex_cached_prompt_tokens", "Prompt tokens whose prefill was saved by a cache."
        )
        self._retries = self._counter(
            "cortex_request_retries", "Requests that left a node that failed for another one."
        )
        self._turned_away = Counter(
            "cortex_gateway_rejections",
            "Requests turned away because too many callers wait for the model.",
            ("model",),
            registry=self.registry,
        )
        self._spend = self._by_caller("cortex_spend_tokens", "Prompt and answer tokens.")
        self._spend_prompt = self._by_caller("cortex_spend_prompt_tokens", "Prompt tokens.")
        self._spend_completion = self._by_caller("cortex_spend_completion_tokens", "Answer tokens.")
        self._by_model = Counter(
            "cortex_key_requests",
            "Requests by key and model.",
            ("account", "key", "model"),
            registry=self.registry,
        )
        self._tokens_by_model = Counter(
            "cortex_key_tokens",
            "Tokens by key, model and kind (prompt, completion, cached).",
            ("account", "key", "model", "kind"),
            registry=self.registry,
        )
        self._usage: dict[tuple[str, str], dict[str, ModelUsage]] = {}
        self._num_key_series = 0
        self._refusals = Counter(
            "cortex_limit_refusals",
            "Requests refused by a limit of their key.",
            ("account", "key", "limit"),
            registry=self.registry,
        )
        self._unauthorized = Counter(
            "cortex_unauthorized_requests",
            "Requests turned away for want of a key that may.",
            registry=self.registry,
        )
        self._limits_faults = Counter(
            "cortex_limits_storage_errors",
            "Calls of the store of limits that failed or were not made.",
            registry=self.registry,
        )
        self._kept = Gauge(
            "cortex_responses_kept", "Responses that are kept.", registry=self.registry
        )
        self._kept_bytes = Gauge(
            "cortex_responses_kept_bytes", "Bytes of kept responses.", registry=self.registry
        )
        self._loads = Counter(
            "cortex_model_loads",
            "Loads that ended, by outcome (loaded, failed).",
            (*_LABELS, "outcome"),
            registry=self.registry,
        )
        self._evictions = Counter(
            "cortex_evictions", "Models evicted for a load.", registry=self.registry
        )
        self._recycles = self._counter(
            "cortex_model_recycles", "Engines started again after defrag_after_cycles."
        )
        self._load_s = self._histogram(
            "cortex_model_load_seconds", "How long loads took.", DURATION_BUCKETS_S
        )
        self._duration_s = self._histogram(
            "cortex_request_duration_seconds",
            "Arrival to last byte, streams to their end.",
            DURATION_BUCKETS_S,
        )
        self._ttft_s = self._histogram(
            "cortex_time_to_first_token_seconds",
            "Arrival to first content token of a stream.",
            TTFT_BUCKETS_S,
        )
        self._token_rate = self._histogram(
            "cortex_tokens_per_second",
            "Answer tokens per second of a stream after its first token.",
            TOKEN_RATE_BUCKETS,
        )
        self.registry.register(_FleetCollector(fleet))

    def record(self, timing: RequestTiming) -> None:
        """Count one finished request."""
        labels = (timing.model, timing.node)
        self._requests.labels(*labels).inc()
        self._duration_s.labels(*labels).observe(timing.duration_s)
        if timing.failed:
            self._errors.labels(*labels).inc()
        if timing.ttft_s is not None:
            self._ttft_s.labels(*labels).observe(timing.ttft_s)
        if timing.prompt_tokens:
            self._prompt_tokens.labels(*labels).inc(timing.prompt_tokens)
        if timing.cached_tokens:
            self._cached_tokens.labels(*labels).inc(timing.cached_tokens)
        if timing.completion_tokens:
            self._completion_tokens.labels(*labels).inc(timing.completion_tokens)
        # The first token belongs to the prefill, so the rate counts the gaps after it.
        if timing.decode_s and timing.completion_tokens > 1:
            rate = (timing.completion_tokens - 1) / timing.decode_s
            self._token_rate.labels(*labels).observe(rate)

        if timing.account:
            caller = (timing.account, timing.key)
            self._spend.labels(*caller).inc(timing.prompt_tokens + timing.completion_tokens)
            self._spend_prompt.labels(*caller).inc(timing.prompt_tokens)
            self._spend_completion.labels(*caller).inc(timing.completion_tokens)
            self._record_by_model(timing)

    def usage(self, account: str, key: str) -> list[ModelUsage]:
        """Return what a key has spent, by model."""
        return list(self._usage.get((account, key), {}).values())

    def _record_by_model(self, timing: RequestTiming) -> None:
        models = self._usage.setdefault((timing.account, timing.key), {})
        name = timing.model
        if name not in models:
            if self._num_key_series >= MAX_KEY_SERIES:
                name = OTHER_MODELS
            models.setdefault(name, ModelUsage(model=name))
            self._num_key_series += 1
        spent = models[name]
        spent.requests += 1
        spent.prompt_tokens += timing.prompt_tokens
        spent.completion_tokens += timing.completion_tokens
        spent.cached_tokens += timing.cached_tokens
        labels = (timing.account, timing.key, name)
        self._by_model.labels(*labels).inc()
        counts = self._tokens_by_model
        counts.labels(*labels, "prompt").inc(timing.prompt_tokens)
        counts.labels(*labels, "completion").inc(timing.completion_tokens)
        counts.labels(*labels, "cached").inc(timing.cached_tokens)

    def record_refusal(self, account: str, key: str, limit: str) -> None:
        """Count a request that a limit of its key turned away."""
        self._refusals.labels(account, key, limit).inc()

    def record_kept(self, count: int, size_bytes: int) -> None:
        """Note how many responses are kept, and their size; from any thread."""
        self._kept.set(count)
        self._kept_bytes.set(size_bytes)

    def record_unauthorized(self) -> None:
        """Count a request without a key that may."""
        self._unauthorized.inc()

    def record_limits_fault(self) -> None:
        """Count a call of the store of limits that came to nothing."""
        self._limits_faults.inc()

    def record_cold_start(self, model: str, node: str) -> None:
        """Count a load that a request made this gateway begin."""
        self._cold_starts.labels(model, node).inc()

    def record_retry(self, model: str, node: str) -> None:
        """Count a request that goes elsewhere, by the node that failed it."""
        self._retries.labels(model, node).inc()

    def record_turned_away(self, model: str) -> None:
        """Count a request for a model that too many callers wait for."""
        self._turned_away.labels(model).inc()

    def record_load(self, model: str, node: str, *, loaded: bool, load_s: float) -> None:
        """Count a load that has ended."""
        self._loads.labels(model, node, "loaded" if loaded else "failed").inc()
        if loaded:
            self._load_s.labels(model, node).observe(load_s)

    def record_recycle(self, model: str, node: str) -> None:
        """Count an engine that was started again to get its memory back in one piece."""
        self._recycles.labels(model, node).inc()

    def record_evictions(self, count: int) -> None:
        """Count models that had to leave."""
        self._evictions.inc(count)

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry)

    def _by_caller(self, name: str, text: str) -> Counter:
        return Counter(name, f"{text} By key.", ("account", "key"), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABELS, registry=self.registry, buckets=buckets)


class _FleetCollector(Collector):
    """Gauges of what is there now: a model or device that has gone leaves no value behind."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges of the present snapshot; an unhealthy node has none but its own."""
        build = version()
        info = GaugeMetricFamily("cortex_build_info", "Always 1.", labels=("version", "git_sha"))
        info.add_metric([build.package_version, build.git_sha], 1)
        yield info
        nodes = self._fleet.snapshot().nodes
        up = GaugeMetricFamily("cortex_node_up", "Whether a node is healthy.", labels=("node",))
        for node in nodes:
            up.add_metric([node.name], float(node.healthy))
        yield up
        for name, text, holds in _NODE_GAUGES:
            family = GaugeMetricFamily(name, text, labels=("node",))
            for node in nodes:
                family.add_metric([node.name], float(holds(node)))
            yield family
        healthy = [node for node in nodes if node.healthy]
        for name, text, attribute in _MODEL_GAUGES:
            family = GaugeMetricFamily(name, text, labels=("node", "model"))
            for node in healthy:
                for load in node.loads.values():
                    family.add_metric([node.name, load.id], getattr(load, attribute))
            yield family
        rejections = CounterMetricFamily(
            "cortex_model_rejections",
            "Requests a model's queue turned away.",
            labels=("node", "model", "reason"),
        )
        for node in healthy:
            for load in node.loads.values():
                for reason, attribute in _REJECTIONS:
                    rejections.add_metric([node.name, load.id, reason], getattr(load, attribute))
        yield rejections
        for name, text, attribute in _DEVICE_GAUGES:
            family = GaugeMetricFamily(name, text, labels=("node", "device"))
            for node in healthy:
                for device in node.health.devices if node.health is not None else []:
                    family.add_metric([node.name, str(device.index)], getattr(device, attribute))
            yield family
