"""A runner driven by hand-made plans, those that a scheduler would make: two steps in flight, tokens fed on the device.

For benches that time a runner alone, without scheduler or front end.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.resolve import plan_cache, resolve
from engine.runner import Placement, load_runner
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config
from engine.step import Bucket, OpenedRows, PageDelta, Ragged, Sampler, SamplingTable, StepPlan


@dataclass(slots=True)
class Stream:
    slot: int
    pages: np.ndarray  # i32
    computed: int = 0


class Driver:
    """One runner, loaded and warmed up."""

    def __init__(
        self, backend: str, path: Path, model: ModelConfig, cache: CacheConfig, schedule: ScheduleConfig
    ) -> None:
        arch = parse_config(read_config(path))
        config = EngineConfig(model=model, cache=cache, schedule=schedule)
        self.runner = load_runner(backend)
        resolved = resolve(config, arch, self.runner.describe())
        self.runner.configure(resolved.runner, Placement())
        self.runner.load(path)
        self.layout, _, _ = plan_cache(config, resolved, self.runner.cache_budget_bytes())
        self.runner.allocate_cache(self.layout)
        self.runner.warm_up()
        self.config = resolved.runner
        self.vocab_size = arch.vocab_size
        self.step_id = self.generation = 0

    def bucket(self, tokens: int, rows: int) -> Bucket:
        fit = [[b for b in sizes if b >= n] or [n] for sizes, n in
               ((self.config.token_buckets, tokens), (self.config.row_buckets, rows))]  # fmt: skip
        return Bucket(tokens=fit[0][0], rows=fit[1][0])

    def plan(self, streams: list[Stream], ids: np.ndarray, samples: bool, opened: bool) -> StepPlan:
        """One step of all streams, each with len(ids) / len(streams) tokens; ids: i32 [T]. opened: their first."""
        count, new = len(streams), len(ids) // len(streams)
        page = self.layout.groups[0].page_tokens
        slots = np.array([s.slot for s in streams], np.int32)
        computed = np.array([s.computed for s in streams], np.int32)
        entries = [
            (s.slot, column, s.pages[column])
            for s in streams
            for column in range(0 if opened else -(-s.computed // page), -(-(s.computed + new) // page))
        ]
        delta = None
        if entries:
            columns = np.array(entries, np.int32).T.copy()
            delta = PageDelta(slots=columns[0], columns=columns[1], pages=columns[2])
        fresh = None
        if opened:
            self.generation += 1
            zeros, ints = np.zeros(count, np.float32), np.zeros(count, np.int32)
            none = Ragged(values=np.zeros(0, np.int32), starts=np.zeros(count + 1, np.int32))
            fresh = OpenedRows(
                slots=slots, generation=np.full(count, self.generation, np.int32), num_computed=computed,
                sampling=SamplingTable(
                    temperature=zeros, top_p=zeros + 1, min_p=zeros, top_k=ints, presence_penalty=zeros,
                    frequency_penalty=zeros, repetition_penalty=zeros + 1, seed=np.zeros(count, np.uint64),
                    num_outputs=ints, min_tokens=ints, max_outputs=ints + 1_000_000, num_logprobs=ints - 1,
                    stop_ids=none,
                ),
            )  # fmt: skip
        for stream in streams:
            stream.computed += new
        self.step_id += 1
        ends = np.arange(1, count + 1, dtype=np.int32) * new
        return StepPlan(
            step_id=self.step_id, bucket=self.bucket(len(ids), count), slots=slots,
            generation=np.full(count, self.generation, np.int32), num_computed=computed,
            num_new=np.full(count, new, np.int32), num_logits=np.full(count, int(samples), np.int32), token_ids=ids,
            positions=(computed[:, None] + np.arange(new, dtype=np.int32)).reshape(1, -1),
            logit_rows=ends - 1 if samples else ends[:0], sampler=Sampler.GREEDY if samples else Sampler.NONE,
            opened=fresh, page_deltas=(delta,) * len(self.layout.groups) if delta is not None else (),
        )  # fmt: skip

    def open(self, count: int, length: int, computed: int = 0) -> list[Stream]:
        """Rows with pages for `length` tokens that follow each other, the first `computed` of them as if computed."""
        page = self.layout.groups[0].page_tokens
        width = -(-length // page)
        if 1 + count * width > self.layout.pools[0].num_pages:
            raise ValueError(f"{count} rows of {length} tokens: {self.layout.pools[0].num_pages} pages are too few")
        return [
            Stream(i, np.arange(1 + i * width, 1 + (i + 1) * width, dtype=np.int32), computed) for i in range(count)
        ]

    def run(self, plan: StepPlan) -> None:
        self.runner.collect(self.runner.submit([plan]))

    def steps(self, rows: list[Stream], count: int) -> list[float]:
        """Seconds at which each of `count` decode steps had been collected, from the start of the first."""
        last = np.full(len(rows), -1, np.int32)
        flying: deque[Any] = deque()
        ends = []
        start = time.perf_counter()
        for _ in range(count):
            flying.append(self.runner.submit([self.plan(rows, last.copy(), True, False)]))
            if len(flying) == self.config.max_in_flight:
                self.runner.collect(flying.popleft())
                ends.append(time.perf_counter() - start)
        while flying:
            self.runner.collect(flying.popleft())
            ends.append(time.perf_counter() - start)
        return ends
