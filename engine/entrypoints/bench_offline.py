"""Offline benches through LLM: the time of one batch, and tokens per second of many prompts."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.entrypoints.bench_prompts import BenchPrompt, jsonl_prompts, random_prompts
from engine.entrypoints.flags import build_engine_config, engine_flags, read_values
from engine.errors import ConfigError
from engine.frontend.input import Prompt, TokensPrompt
from engine.frontend.llm import LLM
from engine.params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def open_llm(args: argparse.Namespace) -> LLM:
    """An LLM with the engine flags of the command line."""
    values = read_values(args, engine_flags())
    build_engine_config(values)  # refusals by flag name
    if "served_model_name" in values:
        values["served_model_name"] = tuple(values["served_model_name"])
    llm = LLM(**values)
    ready = llm.ready
    print(f"backend {ready.backend} | device {ready.device} | {ready.dtype} | {ready.kv_tokens:,} KV tokens")
    return llm


def plain_ids(llm: LLM) -> range:
    """Ids for random prompts: all but the special ones, which stand at either end of a vocabulary."""
    size = llm.ready.vocab_size
    special = llm.model.tokenizer.special_ids if llm.model.tokenizer is not None else frozenset()
    low = max((i for i in special if i < size // 2), default=-1) + 1
    high = min((i for i in special if i >= size // 2), default=size)
    return range(low, high)


def params_of(prompt: BenchPrompt) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=prompt.output_len, ignore_eos=True, detokenize=False)


def as_prompt(prompt: BenchPrompt) -> Prompt:
    return prompt.prompt if isinstance(prompt.prompt, str) else TokensPrompt(prompt_token_ids=prompt.prompt)


def run_once(llm: LLM, prompts: list[BenchPrompt], show: bool) -> tuple[float, int, int]:
    """(seconds, prompt tokens, output tokens)."""
    params = [params_of(p) for p in prompts]
    begun = time.perf_counter()
    outputs = llm.generate([as_prompt(p) for p in prompts], params, use_tqdm=show)
    seconds = time.perf_counter() - begun
    return seconds, sum(len(o.prompt_token_ids) for o in outputs), sum(len(o.outputs[0].token_ids) for o in outputs)


def check_room(llm: LLM, input_len: int, output_len: int) -> None:
    if input_len + output_len > llm.ready.max_model_len:
        raise ConfigError(
            f"--input-len {input_len} and --output-len {output_len} are more than the model length "
            f"{llm.ready.max_model_len} together"
        )


def latency(args: argparse.Namespace) -> int:
    """Prompts differ from batch to batch, so that the prefix cache holds none of them."""
    llm = open_llm(args)
    check_room(llm, args.input_len, args.output_len)

    def batch(seed: int) -> float:
        prompts = random_prompts(
            count=args.batch_size, input_len=args.input_len, output_len=args.output_len, ratio=0.0, prefix_len=0,
            ids=plain_ids(llm), seed=seed,
        )  # fmt: skip
        return run_once(llm, prompts, False)[0]

    for i in range(args.num_iters_warmup):
        batch(i)
    seconds = np.asarray([batch(args.num_iters_warmup + i) for i in range(args.num_iters)])
    tokens = args.batch_size * args.output_len
    print(f"Avg latency: {seconds.mean():.4f} seconds ({tokens / seconds.mean():.1f} output tokens/s)")
    for percentile in PERCENTILES:
        print(f"{percentile}% percentile latency: {np.percentile(seconds, percentile):.4f} seconds")
    percentiles = {str(p): float(np.percentile(seconds, p)) for p in PERCENTILES}
    figures = {"avg_latency": float(seconds.mean()), "latencies": seconds.tolist(), "percentiles": percentiles}
    return write(args, figures)


def throughput(args: argparse.Namespace) -> int:
    llm = open_llm(args)
    if args.dataset_name == "custom":
        prompts = jsonl_prompts(
            args.dataset_path, count=args.num_prompts, output_len=args.output_len, seed=0, shuffle=False
        )
    else:
        spread = 1 + args.random_range_ratio
        check_room(llm, int(args.input_len * spread) + args.prefix_len, int(args.output_len * spread))
        prompts = random_prompts(
            count=args.num_prompts, input_len=args.input_len, output_len=args.output_len,
            ratio=args.random_range_ratio, prefix_len=args.prefix_len, ids=plain_ids(llm), seed=0,
        )  # fmt: skip
    seconds, num_prompt, num_output = run_once(llm, prompts, True)
    total = num_prompt + num_output
    print(
        f"Throughput: {len(prompts) / seconds:.2f} requests/s, {total / seconds:.2f} total tokens/s, "
        f"{num_output / seconds:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_prompt}\nTotal num output tokens:  {num_output}")
    figures = {
        "elapsed_time": seconds,
        "num_requests": len(prompts),
        "total_num_tokens": total,
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": total / seconds,
    }
    return write(args, figures)


def write(args: argparse.Namespace, figures: dict[str, Any]) -> int:
    if args.output_json is not None:
        Path(args.output_json).write_text(json.dumps(figures, indent=1))
    return 0
