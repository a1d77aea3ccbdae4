"""What a step costs on the host: schedule + update + encoding the message to the clients, in thread CPU time.

    python bench/scheduler.py                      # steady decode, events, hashing
    python bench/scheduler.py --nano-vllm PATH     # and that checkout's scheduler in the same run (needs xxhash)
    python bench/scheduler.py --soak 1000000       # A9: simulated requests with strict checks (see bench/soak.py)

The device is a table of random tokens, and its time is not counted. One step of overlap, as in serving: schedule n + 1,
commit keys, then update and encode n. 10 % of the rows each use penalties, seeds and logprobs; the lines with a window
have a second cache group, so that every row (or one in ten) frees pages behind it. An event's cost is what it adds to
the median steady turn, apart for what others wait for and for what overlaps with the device.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

# in place of this folder: bench/kernels.py is no library
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.core.outputs import encode_columns, scheduler_stats
from engine.kv.prefix_cache import chain_keys, root_key
from engine.params import SamplingParams
from engine.request import Request
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.scheduler import Scheduler
from engine.specs.cache import CacheLayout, GroupKind, GroupLayout, GroupSpec, PoolLayout
from engine.step import I32, Logprobs, StepPlan, StepResult

VOCAB = 32_000
TOP = 5  # logprobs of the rows that want them
CONTEXT = 128  # prompt tokens
WARM_UP = 40  # steps before timing


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. spread: prompt lengths differ by up to this many tokens, so that each step fills pages."""

    rows: int
    page: int
    spread: int
    steps: int = 600
    window: int | None = None
    waiting: int = 0
    full_cache: bool = False  # every page given out evicts a cached one
    plain: bool = False  # greedy rows without features
    long_every: int = 0  # one row in so many begins beyond the window, the others never reach it; 0 = all pass it soon

    @property
    def name(self) -> str:
        parts = [f"{self.rows:5d} rows, page {self.page:3d}", "staggered" if self.spread else "aligned"]
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"1 row in {self.long_every} past it"] if self.long_every else []
        parts += [f"{self.waiting} waiting"] if self.waiting else []
        parts += ["cache full"] if self.full_cache else []
        parts += ["plain rows"] if self.plain else []
        return ", ".join(parts)


@dataclass(slots=True)
class Costs:
    """Microseconds of each step."""

    total: list[float] = field(default_factory=list)
    schedule: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)

    def critical(self) -> list[float]:
        """Of each step what does not overlap with the device."""
        return [total - commit for total, commit in zip(self.total, self.commit, strict=True)]

    def line(self) -> str:
        ordered = sorted(self.total)
        median = statistics.median(ordered)
        p99 = ordered[int(0.99 * (len(ordered) - 1))]
        parts = "  ".join(
            f"{name} {statistics.median(getattr(self, name)):6.1f}"
            for name in ("schedule", "commit", "update", "encode")
        )
        return f"median {median:7.1f}  p99 {p99:7.1f}  ({p99 / median:4.1f}x)   {parts}"


class Device:
    """Answers plans from prepared arrays."""

    def __init__(self, max_rows: int) -> None:
        rng = np.random.default_rng(0)
        self.tokens: I32 = rng.integers(100, VOCAB, (64, max_rows, 1)).astype(np.int32)
        self.chosen = rng.random(max_rows, np.float32)
        self.rank = rng.integers(1, 9, max_rows).astype(np.int32)
        self.top_ids = rng.integers(0, VOCAB, (max_rows, TOP)).astype(np.int32)
        self.top = rng.random((max_rows, TOP), np.float32)

    def run(self, plan: StepPlan) -> StepResult:
        rows = plan.num_rows
        wants = plan.num_logprobs
        return StepResult(
            step_id=plan.step_id,
            num_sampled=plan.num_logits.copy(),
            tokens=self.tokens[plan.step_id % 64, :rows],
            error=np.zeros(rows, np.uint8),
            logprobs=None
            if wants < 0
            else Logprobs(
                chosen=self.chosen[:rows],
                rank=self.rank[:rows],
                top_ids=self.top_ids[:rows, :wants],
                top=self.top[:rows, :wants],
            ),
        )


def layout_of(case: Case, max_len: int) -> CacheLayout:
    kinds: list[tuple[GroupKind, int | None]] = [(GroupKind.FULL, None)]
    if case.window is not None:
        kinds.append((GroupKind.WINDOW, case.window))
    per_row = -(-max_len // case.page)
    pages = 2 + case.rows * per_row + (0 if case.full_cache else case.rows * per_row)
    return CacheLayout(
        groups=tuple(
            GroupLayout(
                spec=GroupSpec(kind=kind, layers=(i,), num_kv_heads=1, head_size=64, window=window),
                pool=i,
                page_tokens=case.page,
            )
            for i, (kind, window) in enumerate(kinds)
        ),
        pools=tuple(
            PoolLayout(
                num_pages=pages,
                page_bytes=case.page * 512,
                num_layers=1,
                num_kv_heads=1,
                head_size=64,
                page_tokens=case.page,
            )
            for _ in kinds
        ),
    )


def params_of(i: int, case: Case, max_tokens: int) -> SamplingParams:
    """Of ten rows one uses penalties, one a seed, one logprobs."""
    common: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0.0}
    if not case.plain:
        match i % 10:
            case 0:
                common |= {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.2}
            case 1:
                common |= {"temperature": 1.0, "seed": i, "top_p": 0.9}
            case 2:
                common |= {"logprobs": TOP}
    return SamplingParams(**common)


def request_of(key: int, length: int, params: SamplingParams) -> Request:
    prompt = np.random.default_rng(key).integers(100, VOCAB, length).astype(np.int32)
    return Request(key=key, prompt=prompt, params=params, stop_ids=(2, 3), eos_ids=(2,), seed=key)


class Bench:
    """A scheduler over the stub device, one step of overlap."""

    def __init__(self, case: Case, max_len: int, budget: int = 8192) -> None:
        self.case = case
        config = SchedulerConfig(
            max_num_seqs=case.rows,
            max_num_batched_tokens=max(budget, case.rows),
            max_model_len=max_len,
            row_buckets=tuple(sorted({*(2**i for i in range(11) if 2**i < case.rows), case.rows})),
            vocab_size=VOCAB,
        )
        self.scheduler = Scheduler(config, layout_of(case, max_len))
        self.device = Device(case.rows)
        self.encoder = msgspec.msgpack.Encoder()
        self.open: list[StepPlan] = []

    def turn(self, costs: Costs | None) -> float:
        """-> microseconds of this turn."""
        scheduler, clock = self.scheduler, time.thread_time_ns
        t0 = clock()
        plan = scheduler.schedule()
        t1 = clock()
        scheduler.commit_keys()
        t2 = clock()
        if plan is not None:
            self.open.append(plan)
        t3 = t4 = t5 = t2
        if len(self.open) == 2 or plan is None:
            oldest = self.open.pop(0)
            result = self.device.run(oldest)
            t3 = clock()
            columns = scheduler.update(oldest, result)
            t4 = clock()
            if columns is not None:
                self.encoder.encode(encode_columns(columns, scheduler_stats(scheduler.stats())))
            t5 = clock()
        total = (t2 - t0 + t5 - t3) / 1000
        if costs is not None:
            costs.total.append(total)
            costs.schedule.append((t1 - t0) / 1000)
            costs.commit.append((t2 - t1) / 1000)
            costs.update.append((t4 - t3) / 1000)
            costs.encode.append((t5 - t4) / 1000)
        return total

    def drain(self) -> None:
        while self.scheduler.has_work:
            self.turn(None)

    def fill_cache(self) -> None:
        """Leave keyed pages everywhere, so that each further page evicts one."""
        for key in range(1, self.case.rows + 1):
            length = self.scheduler.config.max_model_len - 1
            self.scheduler.add(request_of(10**6 + key, length, SamplingParams(max_tokens=1)))
        self.drain()

    def start_rows(self, count: int, max_tokens: int) -> None:
        for key in range(1, count + 1):
            length = CONTEXT + (key * 7) % (self.case.spread + 1)
            if self.case.long_every and key % self.case.long_every == 0:
                length += self.case.window or 0
            self.scheduler.add(request_of(key, length, params_of(key, self.case, max_tokens)))
        while len(self.scheduler.state.waiting):
            self.turn(None)
        for _ in range(WARM_UP):
            self.turn(None)


def quiet() -> None:
    """What start-up made lives on, as in the core process."""
    gc.collect()
    gc.freeze()


def steady(case: Case) -> Costs:
    max_len = CONTEXT + case.spread + case.steps + 3 * WARM_UP + (case.window or 0 if case.long_every else 0)
    max_len = -(-max_len // 128) * 128
    bench = Bench(case, max_len)
    if case.full_cache:
        bench.fill_cache()
    bench.start_rows(case.rows, max_len)
    for i in range(case.waiting):
        bench.scheduler.add(request_of(10**7 + i, 16, SamplingParams(max_tokens=4)))
    quiet()
    costs = Costs()
    for _ in range(case.steps):
        bench.turn(costs)
    gc.unfreeze()
    return costs


@dataclass(slots=True)
class Event:
    """Microseconds that an event adds to steady turns, medians.

    critical: what the device or a client waits for (add, schedule, update, encode), in the turn in which it happens.
    next: the same, in the turn after it. overlapped: key commits of both turns, while the device works.
    """

    critical: float
    next: float
    overlapped: float

    def __str__(self) -> str:
        return f"critical {self.critical:6.1f}  next turn {self.next:6.1f}  overlapped {self.overlapped:6.1f}"


def measure_event(turns: list[tuple[Costs, float]], steady: Costs) -> Event:
    """turns: of each event the costs of its turn and the one after, and what came before its turn (`add`)."""
    usual = statistics.median(steady.critical())
    usual_commit = statistics.median(steady.commit)
    both = [costs.critical() for costs, _ in turns]
    return Event(
        critical=statistics.median(first + add for (first, _), (_, add) in zip(both, turns, strict=True)) - usual,
        next=statistics.median(second for _, second in both) - usual,
        overlapped=statistics.median(sum(costs.commit) for costs, _ in turns) - 2 * usual_commit,
    )


def events(page: int, rows: int = 256) -> dict[str, Event]:
    """One admission of a 1k or 8k prompt, and one finish, beside rows - 1 that decode."""
    case = Case(rows, page, 15)
    bench = Bench(case, 9216, budget=16384)
    bench.start_rows(rows - 1, 8000)
    quiet()
    steady = Costs()
    turns: dict[str, list[tuple[Costs, float]]] = {
        name: [] for name in ("admit 1k", "finish 1k", "admit 8k", "finish 8k")
    }
    rng = np.random.default_rng(0)
    key = 10**6
    for length, name in ((1024, "admit 1k"), (8192, "admit 8k")):
        for _ in range(100):
            key += 1
            request = request_of(key, length, params_of(key, case, 6))
            begin = time.thread_time_ns()
            bench.scheduler.add(request)
            added = (time.thread_time_ns() - begin) / 1000
            admission = Costs()
            bench.turn(admission)
            bench.turn(admission)
            turns[name].append((admission, added))
            end = Costs()
            while key in bench.scheduler.state.slot_of:
                end = Costs()
                bench.turn(end)
            bench.turn(end)
            turns[f"finish {name[-2:]}"].append((end, 0.0))
            for _ in range(rng.integers(3, 11)):  # events fall on any turn between two allocations
                bench.turn(steady)
    gc.unfreeze()
    return {name: measure_event(measured, steady) for name, measured in turns.items()}


def hashing() -> float:
    """Microseconds to make the keys of an 8k prompt from int32."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, 8192).astype(np.int32)
    times = []
    for _ in range(50):
        begin = time.thread_time_ns()
        chain_keys(root_key(b"", 0), tokens, 16)
        times.append((time.thread_time_ns() - begin) / 1000)
    return statistics.median(times)


def cases(steps: int) -> Iterator[Case]:
    for rows in (256, 1024):
        for page in (16, 64, 128):
            for spread in (127, 0):
                yield Case(rows, page, spread, steps)
        yield Case(rows, 16, 127, steps, window=128)
        yield Case(rows, 128, 127, steps, window=128)
        yield Case(rows, 16, 127, steps, window=1024, long_every=10)
        yield Case(rows, 16, 127, steps, full_cache=True)
        yield Case(rows, 16, 0, steps, full_cache=True)
        yield Case(rows, 16, 127, steps, waiting=10_000)
        yield Case(rows, 16, 127, steps, plain=True)


def nano_vllm(path: Path, rows: int, steps: int) -> Costs:
    """The same decode through the scheduler of a nano-vllm checkout: schedule + postprocess, block 256, no features."""
    package = types.ModuleType("nanovllm")  # its __init__ imports torch kernels; the scheduler needs none
    package.__path__ = [str(path / "nanovllm")]
    sys.modules["nanovllm"] = package
    scheduler_module = importlib.import_module("nanovllm.engine.scheduler")
    sequence_module = importlib.import_module("nanovllm.engine.sequence")
    params_module = importlib.import_module("nanovllm.sampling_params")
    config = types.SimpleNamespace(
        max_num_seqs=rows,
        max_num_batched_tokens=16384,
        eos=2,
        kvcache_block_size=256,
        num_kvcache_blocks=rows * 8,
    )
    scheduler = scheduler_module.Scheduler(config)
    rng = np.random.default_rng(0)
    for key in range(rows):
        prompt = rng.integers(100, VOCAB, CONTEXT + key * 7 % 128).tolist()
        scheduler.add(sequence_module.Sequence(prompt, params_module.SamplingParams(max_tokens=10**6)))
    tokens = rng.integers(100, VOCAB, rows).tolist()
    costs, timed = Costs(), -WARM_UP
    while timed < steps:
        begin = time.thread_time_ns()
        sequences, is_prefill = scheduler.schedule()
        scheduler.postprocess(sequences, tokens, is_prefill)
        spent = (time.thread_time_ns() - begin) / 1000
        timed += not is_prefill
        if timed > 0:
            costs.total.append(spent)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", default="", help="run the steady cases whose name contains this")
    parser.add_argument("--nano-vllm", type=Path, metavar="PATH", help="a nano-vllm checkout")
    parser.add_argument("--soak", type=int, metavar="N", help="simulate N requests with strict checks instead")
    options = parser.parse_args()
    if options.soak:
        soak_module = importlib.import_module("bench.soak")
        print(soak_module.soak(options.soak, report=True))
        return
    print("us a step, thread CPU time: schedule + key commits + update + encoding\n")
    for case in cases(options.steps):
        if options.only in case.name:
            print(f"{case.name:66s} {steady(case).line()}", flush=True)
    if options.nano_vllm is not None:
        for rows in (256, 1024):
            costs = nano_vllm(options.nano_vllm, rows, options.steps)
            ordered = sorted(costs.total)
            print(
                f"nano-vllm {rows:4d} rows: median {statistics.median(ordered):.1f}  "
                f"p99 {ordered[int(0.99 * (len(ordered) - 1))]:.1f}"
            )
    if not options.only or options.only == "events":
        print()
        for page in (16, 128):
            for name, event in events(page).items():
                print(f"us an event beside 255 decoding rows, page {page:3d}: {name:9s}  {event}")
        print(f"8k prompt hashed from int32: {hashing():.1f} us")


if __name__ == "__main__":
    main()
