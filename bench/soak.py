"""A9: N simulated requests through the real scheduler and KV manager, with strict checks and a stub for the device.

    python bench/scheduler.py --soak 1000000

The traffic is random and seeded: prompts of a few families that share prefixes, two tenants, priorities, aborts in any
state, forced preemptions, failed and cache-losing steps, pools small enough to preempt and evict by themselves, a full
and a window group. The device answers with a hash of (request, position): every finished request is compared with what
that says it must have got, whatever happened to it. `check_integrity` runs every `check_every` steps, cheap checks
after each.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from engine.errors import StepFailed, check
from engine.params import SamplingParams
from engine.request import FinishReason, Request
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.update import StepColumns
from engine.specs.cache import CacheLayout, GroupKind, GroupLayout, GroupSpec, PoolLayout
from engine.step import I32, StepPlan, StepResult

VOCAB = 1000
EOS = 3
PARAMS = tuple(SamplingParams(max_tokens=tokens, temperature=0.0) for tokens in (1, 2, 5, 9, 20, 40))
STEMS = tuple(np.random.default_rng(i).integers(10, VOCAB, 160).astype(np.int32) for i in range(12))


@dataclass(slots=True)
class Count:
    added: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    hit_tokens: int = 0
    heap_growth_blocks: int = 0  # Python objects more at the end than after the first tenth, everything drained
    seconds: float = 0.0

    def __str__(self) -> str:
        return "  ".join(f"{name.replace('_', ' ')} {getattr(self, name):,}" for name in self.__slots__)


@dataclass(slots=True)
class Live:
    num_prompt: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)


def token_of(keys: np.ndarray, positions: np.ndarray) -> I32:
    """The token that a request gets at a position, [n]."""
    x = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x >> np.uint64(33)) % np.uint64(VOCAB)).astype(np.int32)


def soak_layout(page: int = 32) -> CacheLayout:
    kinds: tuple[tuple[GroupKind, int | None], ...] = ((GroupKind.FULL, None), (GroupKind.WINDOW, 48))
    one = PoolLayout(num_pages=100, page_bytes=64, num_layers=1, num_kv_heads=1, head_size=8, page_tokens=page)
    return CacheLayout(
        groups=tuple(
            GroupLayout(
                spec=GroupSpec(kind=kind, layers=(i,), num_kv_heads=1, head_size=8, window=window),
                pool=i,
                page_tokens=page,
            )
            for i, (kind, window) in enumerate(kinds)
        ),
        pools=(one, one),
    )


class Soak:
    def __init__(self, seed: int, check_every: int) -> None:
        self.rng = np.random.default_rng(seed)
        config = SchedulerConfig(
            max_num_seqs=32,
            max_num_batched_tokens=512,
            max_model_len=256,
            vocab_size=VOCAB,
            policy="priority",
            aging_steps=64,
        )
        self.scheduler = Scheduler(config, soak_layout())
        self.check_every = check_every
        self.live: dict[int, Live] = {}
        self.open: list[StepPlan] = []
        self.count = Count()

    def add(self, how_many: int) -> None:
        for _ in range(how_many):
            key = self.count.added
            stem = STEMS[int(self.rng.integers(len(STEMS)))]
            params = PARAMS[int(self.rng.integers(len(PARAMS)))]
            length = int(self.rng.integers(1, len(stem)))
            self.scheduler.add(
                Request(
                    key=key,
                    prompt=stem[:length].copy(),
                    params=params,
                    stop_ids=(EOS,),
                    eos_ids=(EOS,),
                    seed=key,
                    priority=int(self.rng.integers(3)),
                    domain=b"tenant %d" % self.rng.integers(2),
                )
            )
            self.live[key] = Live(length, params.max_tokens or 0)
            self.count.added += 1

    def turn(self) -> None:
        scheduler = self.scheduler
        plan = scheduler.schedule()
        scheduler.commit_keys()
        if plan is not None:
            self.open.append(plan)
            self.count.steps += 1
            check(plan.num_tokens <= 512 and plan.num_rows <= 32, "S-1")
        if self.open and (len(self.open) == 2 or plan is None):
            self.collect()
        elif plan is None:
            check(not len(scheduler.state.waiting), "S-3: requests wait and nothing runs")
        if self.count.steps % self.check_every == 0:
            scheduler.check_integrity()

    def collect(self) -> None:
        plan = self.open.pop(0)
        luck = self.rng.random()
        if luck < 0.0005:
            lost = luck < 0.0002
            self.scheduler.fail(plan, StepFailed("soak", rows=(0,), cache_lost=lost))
            for other in self.open:
                self.scheduler.fail(other, StepFailed("behind a failed step", cache_lost=lost))
            self.open.clear()
        else:
            columns = self.scheduler.update(plan, self.run(plan))
            if columns is not None:
                self.hear(columns)
        for failure in self.scheduler.take_failures():
            del self.live[failure.key]
            self.count.failed += 1

    def run(self, plan: StepPlan) -> StepResult:
        table = self.scheduler.state.table
        live = table.generation[plan.slots] == plan.generation
        index = plan.num_computed + plan.num_new
        keys = np.where(live, table.key[plan.slots], 0)
        tokens = token_of(keys, index)[:, None]
        return StepResult(
            step_id=plan.step_id,
            num_sampled=plan.num_logits.copy(),
            tokens=tokens,
            error=np.zeros(plan.num_rows, np.uint8),
        )

    def hear(self, columns: StepColumns) -> None:
        self.count.tokens += len(columns.tokens)
        for key, token, finish in zip(
            columns.keys.tolist(), columns.tokens.tolist(), columns.finish.tolist(), strict=True
        ):
            live = self.live[key]  # KeyError: output after the end, or for an aborted request
            live.tokens.append(token)
            if finish:
                del self.live[key]
                self.count.finished += 1
                ended = token == EOS if finish == FinishReason.STOP else len(live.tokens) == live.max_tokens
                check(ended and EOS not in live.tokens[:-1], "S-11: it ended at the wrong token")
                self.check_tokens(key, live)

    def check_tokens(self, key: int, live: Live) -> None:
        """S-8: what a request says depends on nothing but itself."""
        count = len(live.tokens)
        expected = token_of(np.full(count, key), live.num_prompt + np.arange(count))
        check(expected.tolist() == live.tokens, f"request {key} changed its answer")

    def disturb(self) -> None:
        luck = self.rng.random()
        if luck < 0.03 and self.live:
            keys = list(self.live)
            victim = keys[int(self.rng.integers(len(keys)))]
            self.count.aborted += self.scheduler.abort([victim, -1])
            del self.live[victim]
        elif luck < 0.04 and len(self.scheduler.state.running) > 1:
            self.scheduler.state.preempt(int(self.scheduler.state.running.slots[-1]))
        elif luck < 0.041:
            self.scheduler.reset_prefix_cache()

    def until(self, num_requests: int, report: bool) -> None:
        """Take in requests up to this number in all, and let everything finish."""
        while self.count.added < num_requests or self.scheduler.has_work:
            if self.count.added < num_requests and len(self.scheduler.state.waiting) < 64:
                self.add(min(int(self.rng.integers(0, 8)), num_requests - self.count.added))
            self.turn()
            self.disturb()
            if report and self.count.steps % 50_000 == 0:
                print(f"{self.count.added:,} requests, {self.count.steps:,} steps", flush=True)
        self.scheduler.check_integrity()
        check(not self.live, "S-2: a request never ended")
        for pool in self.scheduler.state.kv.pools:
            check(pool.num_free == pool.num_pages - 1, "P-11: pages are missing at the end")
        gc.collect()


def soak(num_requests: int, *, seed: int = 0, check_every: int = 50, report: bool = False) -> Count:
    """Run and return what happened. Raises InternalError at the first violation."""
    run = Soak(seed, check_every)
    begin = time.monotonic()
    run.until(num_requests // 10, report)
    blocks = sys.getallocatedblocks()
    run.until(num_requests, report)
    count = run.count
    count.heap_growth_blocks = sys.getallocatedblocks() - blocks
    count.preemptions = run.scheduler.stats().num_preemptions
    count.hit_tokens = run.scheduler.stats().prefix_hits
    count.seconds = round(time.monotonic() - begin, 1)
    return count
