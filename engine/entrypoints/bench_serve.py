"""`twinfer bench serve`: options into prompts and a load, run, report, save."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from engine import env
from engine.entrypoints.bench_load import METRICS, Load, report, run_load, summarise
from engine.entrypoints.bench_prompts import BenchPrompt, jsonl_prompts, random_prompts
from engine.entrypoints.flags import UsageError, nearest
from engine.entrypoints.http_client import Client, ClientError

# The random dataset draws from the ids of this text: ordinary tokens of any model.
SAMPLE_TEXT = " ".join(f"{word}{i}" for i in range(40) for word in ("the", " value", " of", " list", " item", "\n"))
PLAIN_IDS = tuple(range(100, 256))  # for servers without /tokenize


def read_lists(args: argparse.Namespace) -> tuple[list[str], list[float]]:
    """(metrics, percentiles) to print. Raises UsageError."""

    metrics = [name.strip() for name in args.percentile_metrics.split(",") if name.strip()]
    for name in metrics:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise UsageError(f"--percentile-metrics: {name!r} is not known; {known}{nearest(name, list(METRICS))}")
    try:
        percentiles = [float(text) for text in args.metric_percentiles.split(",")]
    except ValueError:
        percentiles = [-1.0]
    if not all(0 < p <= 100 for p in percentiles):
        raise UsageError(f"--metric-percentiles: {args.metric_percentiles!r} is not accepted; expected like 50,99")
    return metrics, percentiles


def check(args: argparse.Namespace) -> None:
    for name in ("num_prompts", "random_input_len", "random_output_len"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not accepted; expected >= 1")
    if not args.request_rate > 0 or not args.burstiness > 0:
        raise UsageError("--request-rate and --burstiness must be more than 0")
    if not 0 <= args.random_range_ratio < 1:
        raise UsageError(f"--random-range-ratio: {args.random_range_ratio} is not accepted; expected 0 <= X < 1")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise UsageError(f"--max-concurrency: {args.max_concurrency} is not accepted; expected >= 1")
    if (args.dataset_name == "custom") != (args.dataset_path is not None):
        raise UsageError("--dataset-path: needed with, and only with, --dataset-name custom")


def extra_body(args: argparse.Namespace) -> dict[str, Any]:
    extra: Any = {}
    if args.extra_body is not None:
        try:
            extra = json.loads(args.extra_body)
        except ValueError:
            extra = None
    if not isinstance(extra, dict):
        raise UsageError(f"--extra-body: {args.extra_body!r} is not a JSON object")
    return ({"ignore_eos": True} if args.ignore_eos else {}) | extra


async def ids_of(client: Client, model: str) -> tuple[int, ...]:
    """Token ids for random prompts."""
    try:
        answer = await client.post("/tokenize", {"model": model, "prompt": SAMPLE_TEXT, "add_special_tokens": False})
        return tuple(sorted(set(answer["tokens"])))
    except ClientError as error:
        if error.status == 0:
            raise
        return PLAIN_IDS


async def read_prompts(args: argparse.Namespace, client: Client, model: str, chat: bool) -> list[BenchPrompt]:
    """The prompts that the options describe."""
    if args.dataset_name == "custom":
        prompts = jsonl_prompts(
            args.dataset_path, count=args.num_prompts, output_len=args.random_output_len, seed=args.seed,
            shuffle=not args.disable_shuffle,
        )  # fmt: skip
    else:
        prompts = random_prompts(
            count=args.num_prompts, input_len=args.random_input_len, output_len=args.random_output_len,
            ratio=args.random_range_ratio, prefix_len=args.random_prefix_len, ids=await ids_of(client, model),
            seed=args.seed,
        )  # fmt: skip
    if not chat:
        return prompts
    # messages hold text: the server says what the ids mean
    texts = [
        p.prompt
        if isinstance(p.prompt, str)
        else (await client.post("/detokenize", {"model": model, "tokens": p.prompt}))["prompt"]
        for p in prompts
    ]
    return [BenchPrompt(text, p.output_len) for text, p in zip(texts, prompts, strict=True)]


async def warm_up(load: Load, prompts: list[BenchPrompt], count: int) -> None:
    """Requests before the clock starts. Raises ClientError when none of them succeeds."""
    if count:
        seen, _ = await run_load(load, [prompts[i % len(prompts)] for i in range(count)], lambda _: None)
        if all(one.error for one in seen):
            raise ClientError(f"the warm-up failed: {seen[0].error}")


async def bench(args: argparse.Namespace) -> int:
    metrics, percentiles = read_lists(args)
    client = Client(args.base_url, args.api_key or env.read("TWINFER_API_KEY"))
    model = args.model or await client.model_name()
    chat = args.endpoint_type == "openai-chat"
    load = Load(
        client=client, model=model, chat=chat, request_rate=args.request_rate, burstiness=args.burstiness,
        max_concurrency=args.max_concurrency, extra=extra_body(args), seed=args.seed,
    )  # fmt: skip
    prompts = await read_prompts(args, client, model, chat)
    await warm_up(load, prompts, args.num_warmups)
    show = sys.stderr.isatty()

    def progress(done: int) -> None:
        if show:
            print(f"\r{done}/{len(prompts)} requests", end="" if done < len(prompts) else "\n", file=sys.stderr)

    seen, duration_s = await run_load(load, prompts, progress)
    figures = summarise(seen, duration_s, percentiles)
    print(report(figures, metrics, percentiles))
    for text in sorted({s.error for s in seen if s.error})[:5]:
        print(f"failed: {text}", file=sys.stderr)
    if args.save_result or args.save_detailed or args.result_filename:
        details = {name: [getattr(s, name) for s in seen] for name in ("first_s", "gaps_s", "e2e_s", "error")}
        save(args, model, figures | (details if args.save_detailed else {}))
    return 1 if figures["completed"] == 0 else 0


def save(args: argparse.Namespace, model: str, figures: dict[str, Any]) -> None:
    settings = {name: value for name, value in vars(args).items() if name != "api_key"}
    settings["request_rate"] = str(args.request_rate)  # JSON has no infinity
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = args.result_filename or f"twinfer-{args.request_rate}qps-{model.split('/')[-1]}-{stamp}.json"
    path = Path(args.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": stamp, **settings, "model": model, **figures}, indent=1))
    print(f"saved {path}")


def bench_serve(args: argparse.Namespace) -> int:
    check(args)
    return asyncio.run(bench(args))
