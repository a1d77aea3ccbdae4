"""What the host pays for a step of the TPU's form: `submit` to its return, and one call of each of its programs.

    python -m bench.dispatch [--rows 1 256] [--steps 150]

The step is that of a TPU, stacked weights under a scan, with the plain kernel on this machine's CPU and a tiny model.
Steps are submitted behind one in flight, as the engine does: XLA:CPU runs a small program in the calling thread where
all its arguments are there, and then a call's time has the device's in it. Medians (the tenth .. the last hundredth).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from backends.jax import stacks
from backends.jax.runner import Runner
from bench.plans import Driver, Stream
from engine.config import CacheConfig, ModelConfig, ScheduleConfig
from engine.step import PageDelta, Sampler, StepPlan
from pallas_kernels import dispatch

TURNS = 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def spread(name: str, times: list[float]) -> None:
    low, middle, high = np.percentile(np.array(times) * 1e3, (10, 50, 99))
    print(f"{name:34} {middle:7.3f} ms  ({low:.3f} .. {high:.3f})", flush=True)


def timed(call: Callable[[int], object], count: int, done: Callable[[object], object]) -> list[float]:
    """Seconds of each of `count` calls, one in flight. done(what a call gave): off the clock, after the next call."""
    times, last = [], None
    for index in range(count):
        start = time.perf_counter()
        given = call(index)
        times.append(time.perf_counter() - start)
        if index:
            done(last)
        last = given
    done(last)
    return times


def whole_table(driver: Driver, streams: list[Stream]) -> tuple[PageDelta, ...]:
    """All pages of all rows at once, so that plans need not name them as rows grow."""
    columns = np.arange(len(streams[0].pages), dtype=np.int32)
    slots = np.repeat(np.array([stream.slot for stream in streams], np.int32), len(columns))
    pages = np.concatenate([stream.pages for stream in streams])
    return (PageDelta(slots=slots, columns=np.tile(columns, len(streams)), pages=pages),) * len(driver.layout.groups)


def measure(driver: Driver, rows: int, steps: int) -> None:
    runner, last = driver.runner, np.full(rows, -1, np.int32)
    assert isinstance(runner, Runner)
    streams = driver.open(rows, (2 + TURNS) * steps + 1)
    begin = driver.plan(streams, np.full(rows, 5, np.int32), True, True)
    driver.run(replace(begin, page_deltas=whole_table(driver, streams)))

    def plans(**change: Any) -> list[StepPlan]:
        found = []
        for _ in range(steps):
            found.append(replace(driver.plan(streams, last.copy(), True, False), page_deltas=(), **change))
            for stream in streams:
                stream.computed += found[-1].num_steps - 1
        return found

    def submit(name: str, plans: list[StepPlan]) -> None:
        spread(
            f"submit, {rows} rows, {name}", timed(lambda index: runner.submit([plans[index]]), steps, runner.collect)
        )

    submit("greedy", plans())
    submit("sampled", plans(sampler=Sampler.FULL))
    submit(f"{TURNS} turns", plans(num_steps=TURNS))
    programs, state, plan = runner._ready(), runner._device_state(), begin
    packer = programs.packer(plan.bucket)
    packing = timed(lambda index: packer.pack(plan, (None,), True), steps, lambda given: None)
    spread("  of a greedy one: packing", packing)
    packed = packer.pack(plan, (None,), True)
    count = len(jax.tree_util.tree_leaves((runner._params, state.caches, state.rows, packed)))
    call = timed(lambda index: programs.forward(state, packer.shape.tokens, packed)[2], steps, jax.block_until_ready)
    spread(f"  and the program, {count} arguments", call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    dispatch.choose_kernel = lambda platform, head_size: "plain"
    stacks.stacks_layers = lambda platform: True
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        driver = Driver(
            "jax", Path(folder), ModelConfig(load_format="dummy", dtype="float32"),
            CacheConfig(kv_cache_memory_bytes=256 << 20),
            ScheduleConfig(
                max_num_seqs=max(args.rows), max_num_batched_tokens=max(args.rows), num_scheduler_steps=TURNS
            ),
        )  # fmt: skip
        for rows in args.rows:
            measure(driver, rows, args.steps)


if __name__ == "__main__":
    main()
