"""A load on a running server: when requests start, what each one saw, and the figures over all of them.

Definitions are those of `vllm bench serve`, so that figures compare: TTFT = start to first event with a choice,
ITL = gaps between such events, E2EL = start to last, TPOT = (E2EL - TTFT) / (output tokens - 1).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.entrypoints.bench_prompts import BenchPrompt
from engine.entrypoints.http_client import Client, ClientError


@dataclass(slots=True)
class Observed:
    """One request as its client saw it. Times in seconds; `error` "" = it succeeded."""

    start: float
    prompt_len: int = 0
    output_len: int = 0
    first_s: float = 0.0
    e2e_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def per_token_s(self) -> float | None:
        return (self.e2e_s - self.first_s) / (self.output_len - 1) if self.output_len > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests are sent. request_rate inf = all at once; burstiness 1 = Poisson arrivals."""

    client: Client
    model: str
    chat: bool
    request_rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def body(self, prompt: BenchPrompt) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": prompt.output_len, "temperature": 0.0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, **self.extra}
        if self.chat:
            body["messages"] = [{"role": "user", "content": prompt.prompt}]
        else:
            body["prompt"] = prompt.prompt
        return body


async def observe(load: Load, prompt: BenchPrompt) -> Observed:
    """Send one request and note when its events come."""
    seen = Observed(start=time.perf_counter())
    last = seen.start
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    try:
        async for event in load.client.events(path, load.body(prompt)):
            usage = event.get("usage")
            if usage:
                seen.prompt_len, seen.output_len = usage["prompt_tokens"], usage["completion_tokens"]
            if not event.get("choices"):
                continue
            now = time.perf_counter()
            if not seen.first_s:
                seen.first_s = now - seen.start
            else:
                seen.gaps_s.append(now - last)
            last = now
        seen.e2e_s = last - seen.start
        if not seen.first_s:
            seen.error = "no tokens came"
    except ClientError as error:
        seen.error = str(error)
    return seen


async def run_load(
    load: Load, prompts: Sequence[BenchPrompt], progress: Callable[[int], None]
) -> tuple[list[Observed], float]:
    """(what each request saw, seconds from the first start to the last end)."""
    rng = np.random.default_rng(load.seed)
    slots = asyncio.Semaphore(load.max_concurrency or len(prompts))
    done = 0

    async def one(prompt: BenchPrompt) -> Observed:
        nonlocal done
        async with slots:
            seen = await observe(load, prompt)
        done += 1
        progress(done)
        return seen

    begun = time.perf_counter()
    tasks = []
    due = begun
    for prompt in prompts:
        tasks.append(asyncio.ensure_future(one(prompt)))
        if np.isfinite(load.request_rate):
            # gaps of a Gamma process: mean 1 / rate, shape = burstiness (1 = exponential gaps, Poisson arrivals)
            due += float(rng.gamma(load.burstiness, 1 / (load.request_rate * load.burstiness)))
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    seen = await asyncio.gather(*tasks)
    return list(seen), time.perf_counter() - begun


METRICS = {"ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)"}
METRICS |= {"itl": "Inter-token Latency", "e2el": "End-to-end Latency"}


def summarise(seen: Sequence[Observed], duration_s: float, percentiles: Sequence[float]) -> dict[str, Any]:
    """The figures, under the names that vLLM saves them by; times in milliseconds."""
    good = [s for s in seen if not s.error]
    prompt, output = sum(s.prompt_len for s in good), sum(s.output_len for s in good)
    figures: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(seen) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(good) / duration_s,
        "output_throughput": output / duration_s,
        "total_token_throughput": (prompt + output) / duration_s,
    }
    values = {
        "ttft": [s.first_s for s in good],
        "tpot": [s.per_token_s for s in good if s.per_token_s is not None],
        "itl": [gap for s in good for gap in s.gaps_s],
        "e2el": [s.e2e_s for s in good],
    }
    for name, seconds in values.items():
        ms = np.asarray(seconds or [0.0], np.float64) * 1000
        figures[f"mean_{name}_ms"] = float(ms.mean())
        figures[f"median_{name}_ms"] = float(np.median(ms))
        figures[f"std_{name}_ms"] = float(ms.std())
        for percentile in percentiles:
            figures[f"p{percentile:g}_{name}_ms"] = float(np.percentile(ms, percentile))
    return figures


def report(figures: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The figures as text, laid out as `vllm bench serve` prints them."""
    rows: list[tuple[str, str]] = [
        ("Successful requests:", str(figures["completed"])),
        ("Failed requests:", str(figures["failed"])),
        ("Benchmark duration (s):", f"{figures['duration']:.2f}"),
        ("Total input tokens:", str(figures["total_input_tokens"])),
        ("Total generated tokens:", str(figures["total_output_tokens"])),
        ("Request throughput (req/s):", f"{figures['request_throughput']:.2f}"),
        ("Output token throughput (tok/s):", f"{figures['output_throughput']:.2f}"),
        ("Total token throughput (tok/s):", f"{figures['total_token_throughput']:.2f}"),
    ]
    lines = ["{:=^50}".format(" Serving Benchmark Result ")]
    lines += [f"{name:<40} {value:<9}" for name, value in rows]
    for metric in metrics:
        lines.append(f"{METRICS[metric]:-^50}")
        for kind in ("mean", "median", *(f"p{p:g}" for p in percentiles)):
            shown = kind.capitalize()
            lines.append(f"{shown + ' ' + metric.upper() + ' (ms):':<40} {figures[f'{kind}_{metric}_ms']:<9.2f}")
    return "\n".join([*(line.rstrip() for line in lines), "=" * 50])
