"""The exported page parses, its numbers are those observed, and no client can add a series."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as ReferenceHistogram
from prometheus_client.parser import text_string_to_metric_families

from engine.metrics.export import EngineMetrics, HttpMetrics, MetricsPage
from engine.metrics.histogram import Histogram, decades
from engine.metrics.stats import FinishedRequest, IterationStats


@dataclass
class Gauges:
    num_running: int = 3
    num_waiting: int = 4
    kv_usage: float = 0.25
    prefix_queries: int = 100
    prefix_hits: int = 60
    num_preemptions: int = 2


def samples(page: MetricsPage) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(page.render().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def test_numbers_of_a_step_appear() -> None:
    metrics = EngineMetrics("m", max_model_len=1000, cache={"block_size": "16"})
    finished = FinishedRequest(
        reason="length", num_prompt=7, num_generated=5, n=1, max_tokens=5, e2e_s=3.0, queued_s=0.5, first_token_s=1.0
    )
    step = IterationStats(num_prompt=7, num_generated=2, first_token_s=[1.0], inter_token_s=[0.5], finished=[finished])
    metrics.on_step(step, Gauges())
    found = samples(MetricsPage(metrics))

    def value(name: str, **labels: str) -> float:
        return found[f"twinfer:{name}", frozenset({"model_name": "m", "engine": "0", **labels}.items())]

    assert value("num_requests_running") == 3
    assert value("num_requests_waiting") == 4
    assert value("kv_cache_usage_perc") == 0.25
    assert value("cache_config_info", block_size="16") == 1
    assert value("prompt_tokens_total") == 7
    assert value("generation_tokens_total") == 2
    assert value("request_success_total", finished_reason="length") == 1
    assert value("request_success_total", finished_reason="stop") == 0
    assert value("num_preemptions_total") == 2
    assert value("prefix_cache_queries_total") == 100
    assert value("prefix_cache_hits_total") == 60
    sums = {
        "time_to_first_token_seconds": 1.0,
        "inter_token_latency_seconds": 0.5,
        "e2e_request_latency_seconds": 3.0,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 0.5,
        "request_decode_time_seconds": 2.0,
        "request_inference_time_seconds": 2.5,
        "request_time_per_output_token_seconds": 0.5,
        "request_prompt_tokens": 7,
        "request_generation_tokens": 5,
        "iteration_tokens_total": 9,
        "request_params_n": 1,
        "request_params_max_tokens": 5,
    }
    for name, total in sums.items():
        assert value(f"{name}_sum") == pytest.approx(total), name
        assert value(f"{name}_count") == 1, name


@settings(max_examples=30)
@given(st.lists(st.floats(0, 200, allow_nan=False), max_size=50), st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_histogram_equals_the_reference_client(values: list[float], bounds: list[float]) -> None:
    bounds = sorted({float(np.float32(b)) for b in bounds})
    registry = CollectorRegistry()
    reference = ReferenceHistogram("h", "text", buckets=bounds, registry=registry)
    ours = Histogram("h", "text", bounds)
    for v in values:
        reference.observe(v)
    ours.observe_all(values)
    expected = [s.value for f in registry.collect() for s in f.samples if s.name == "h_bucket"]
    assert [s.value for s in ours.family({}).samples if s.name == "h_bucket"] == expected


def test_bucket_names_are_floats_ascending() -> None:
    ours = Histogram("h", "text", decades(5000))
    names = [s.labels["le"] for s in ours.family({}).samples if s.name == "h_bucket"]
    assert [float(n) for n in names] == sorted(float(n) for n in names)
    assert decades(5000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


def test_clients_cannot_add_series() -> None:
    http = HttpMetrics()
    http.observe("/v1/completions", "POST", 200, 0.1)
    http.observe(None, "GET", 404, 0.1)
    http.observe(None, "other", 404, 0.1)
    page = MetricsPage(http)
    before = len(samples(page))
    for i in range(500):
        http.observe(None, f"BREW{i}", 404, 0.1)
    assert len(samples(page)) == before
