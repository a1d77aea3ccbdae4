"""The Prometheus page: vLLM's core metrics under `twinfer:`, and the HTTP counters.

EngineMetrics is a StatsListener (fed by the front end once a step) and a prometheus_client collector (read by a
scrape). It registers in its own registry, never in the process-wide one. Label sets are closed (R20): the model's name
and engine index are fixed at construction, finish reasons and HTTP labels come from tables, so no client
can add a series.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from engine.metrics.histogram import Histogram, decades
from engine.metrics.stats import FinishedRequest, IterationStats, SchedulerGauges

PREFIX = "twinfer:"
REASONS = ("stop", "length", "abort", "error")
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
STATUS_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx")

# Bounds in seconds, those of vLLM's metrics of the same names, so that its dashboards fit.
# fmt: off
FIRST_TOKEN_BOUNDS: tuple[float, ...] = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
INTER_TOKEN_BOUNDS: tuple[float, ...] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BOUNDS: tuple[float, ...] = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
# fmt: on
STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HTTP_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
N_BOUNDS = (1, 2, 5, 10, 20)


class EngineMetrics(Collector):
    """Everything about one engine. `cache` is the fixed facts of its KV cache, shown as cache_config_info."""

    def __init__(self, model_name: str, *, max_model_len: int, cache: dict[str, str], engine: int = 0) -> None:
        self.labels = {"model_name": model_name, "engine": str(engine)}
        self._cache = cache
        self._gauges: SchedulerGauges | None = None
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished = dict.fromkeys(REASONS, 0)
        lengths = decades(max_model_len)

        def seconds(name: str, text: str, bounds: tuple[float, ...] = REQUEST_BOUNDS) -> Histogram:
            return Histogram(f"{PREFIX}{name}_seconds", text, bounds)

        self._first_token = seconds("time_to_first_token", "Arrival to first token.", FIRST_TOKEN_BOUNDS)
        self._inter_token = seconds("inter_token_latency", "Time between two tokens.", INTER_TOKEN_BOUNDS)
        self._e2e = seconds("e2e_request_latency", "Arrival to end of the request.")
        self._queue = seconds("request_queue_time", "Arrival to first scheduled.")
        self._prefill = seconds("request_prefill_time", "First scheduled to first token.")
        self._decode = seconds("request_decode_time", "First token to end.")
        self._inference = seconds("request_inference_time", "First scheduled to end.")
        self._per_token = seconds(
            "request_time_per_output_token", "Mean time per output token after the first.", INTER_TOKEN_BOUNDS
        )
        self._prompt_length = Histogram(f"{PREFIX}request_prompt_tokens", "Prompt tokens per request.", lengths)
        self._output_length = Histogram(f"{PREFIX}request_generation_tokens", "Output tokens per request.", lengths)
        self._step_tokens = Histogram(f"{PREFIX}iteration_tokens_total", "Tokens per engine step.", STEP_TOKEN_BOUNDS)
        self._params_n = Histogram(f"{PREFIX}request_params_n", "The n that requests asked for.", N_BOUNDS)
        self._params_max = Histogram(f"{PREFIX}request_params_max_tokens", "The max_tokens asked for.", lengths)

    def on_step(self, iteration: IterationStats, scheduler: SchedulerGauges | None) -> None:
        """StatsListener: one step's outputs."""
        if scheduler is not None:
            self._gauges = scheduler
        tokens = iteration.num_prompt + iteration.num_generated
        if tokens:
            self._prompt_tokens += iteration.num_prompt
            self._generation_tokens += iteration.num_generated
            self._step_tokens.observe(tokens)
        self._first_token.observe_all(iteration.first_token_s)
        self._inter_token.observe_all(iteration.inter_token_s)
        for request in iteration.finished:
            self._finish(request)

    def _finish(self, request: FinishedRequest) -> None:
        self._finished[request.reason if request.reason in REASONS else "error"] += 1
        self._e2e.observe(request.e2e_s)
        self._queue.observe(request.queued_s)
        self._prefill.observe(request.prefill_s)
        self._decode.observe(request.decode_s)
        self._inference.observe(request.inference_s)
        self._per_token.observe(request.per_output_token_s)
        self._prompt_length.observe(request.num_prompt)
        self._output_length.observe(request.num_generated)
        self._params_n.observe(request.n)
        self._params_max.observe(request.max_tokens)

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_gauges()
        yield from self._collect_counters()
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                yield histogram.family(self.labels)

    def _collect_gauges(self) -> Iterator[Metric]:
        gauges = self._gauges
        for name, text, value in (
            ("num_requests_running", "Sequences in the running batch.", gauges.num_running if gauges else 0),
            ("num_requests_waiting", "Sequences waiting to be scheduled.", gauges.num_waiting if gauges else 0),
            ("kv_cache_usage_perc", "KV-cache usage; 1 means full.", gauges.kv_usage if gauges else 0.0),
        ):
            family = GaugeMetricFamily(PREFIX + name, text, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), value)
            yield family
        info = GaugeMetricFamily(
            f"{PREFIX}cache_config_info", "Facts of the KV cache.", labels=[*self.labels, *self._cache]
        )
        info.add_metric([*self.labels.values(), *self._cache.values()], 1)
        yield info

    def _collect_counters(self) -> Iterator[Metric]:
        gauges = self._gauges
        values = list(self.labels.values())
        for name, text, count in (
            ("prompt_tokens", "Prompt tokens processed.", self._prompt_tokens),
            ("generation_tokens", "Tokens generated.", self._generation_tokens),
            ("num_preemptions", "Preemptions.", gauges.num_preemptions if gauges else 0),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", gauges.prefix_queries if gauges else 0),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", gauges.prefix_hits if gauges else 0),
        ):
            family = CounterMetricFamily(PREFIX + name, text, labels=list(self.labels))
            family.add_metric(values, count)
            yield family
        success = CounterMetricFamily(
            f"{PREFIX}request_success", "Requests ended, by reason.", labels=[*self.labels, "finished_reason"]
        )
        for reason, count in self._finished.items():
            success.add_metric([*values, reason], count)
        yield success


class HttpMetrics(Collector):
    """http_requests by route template, method and status class; latency by route template and method."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], int] = {}
        self._latency: dict[tuple[str, str], Histogram] = {}

    def observe(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """One answered request. route: the template ("/v1/models/{model_id}"), None when no route matched."""
        handler = route or "none"
        method = method if method in METHODS else "other"
        status_class = f"{status // 100}xx"
        key = (handler, method, status_class if status_class in STATUS_CLASSES else "other")
        self._counts[key] = self._counts.get(key, 0) + 1
        histogram = self._latency.get(key[:2])
        if histogram is None:
            histogram = self._latency[key[:2]] = Histogram("http_request_duration_seconds", "", HTTP_BOUNDS)
        histogram.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        counts = CounterMetricFamily("http_requests", "HTTP requests answered.", labels=["handler", "method", "status"])
        for key, count in self._counts.items():
            counts.add_metric(list(key), count)
        yield counts
        latency = HistogramMetricFamily(
            "http_request_duration_seconds", "Time to answer, streams to their end.", labels=["handler", "method"]
        )
        for labels, histogram in self._latency.items():
            histogram.add_to(latency, list(labels))
        yield latency


class MetricsPage:
    """The registry of one server and its rendered page."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, *collectors: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        for collector in collectors:
            self._registry.register(collector)

    def render(self) -> bytes:
        return generate_latest(self._registry)
