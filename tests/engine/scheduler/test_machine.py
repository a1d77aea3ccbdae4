"""Hypothesis drives the whole core: real loop, scheduler and manager over the fake runner (properties.md, S- and P-).

After every rule: check_integrity, the prefix index against what the pages really hold (P-7, P-8, P-13), the oldest
running row still runs (S-6). At the end: everything finishes within the S-5 bound, every answer equals the one that the
request gives when it is alone (S-8, S-9, S-10, S-14), every page comes back (P-11).
"""

from __future__ import annotations

from functools import cache

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.messages import ResetPrefixCache
from engine.errors import StepFailed
from engine.kv.prefix_cache import chain_keys
from engine.params import SamplingParams
from engine.request import FinishReason, Request
from engine.step import StepPlan
from tests.engine.scheduler.harness import EOS, Answer, Core, Sizes, alone, prompt_of

KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0, "max_tokens": 7},
    {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True},
    {"temperature": 0.0, "max_tokens": 1},
    {"temperature": 1.0, "seed": 5, "max_tokens": 12, "top_k": 20, "min_tokens": 3},
    {"temperature": 0.8, "seed": 9, "max_tokens": 20, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"temperature": 0.0, "max_tokens": 6, "logprobs": 2, "stop_token_ids": [11, 12, 13, 14, 15]},
    {"temperature": 1.0, "seed": 3, "max_tokens": 9, "logit_bias": {20: 3.0}, "logprobs": 0},
    {"temperature": 0.0, "max_tokens": 5, "prompt_logprobs": 1},
    {"temperature": 0.0, "max_tokens": None, "min_tokens": 2},
)
DOMAINS = (b"", b"tenant a", b"tenant b")

LAYOUTS = (
    {"windows": (None,), "pools": (0,)},
    {"windows": (24,), "pools": (0,)},
    {"windows": (None, 20), "pools": (0, 0)},
    {"windows": (None, 33), "pools": (0, 1)},
    {"windows": (20, 40, None), "pools": (0, 0, 1)},
)


def params_of(kind: int, n: int = 1) -> SamplingParams:
    return SamplingParams(**{**KINDS[kind], "n": n})  # type: ignore[arg-type]


@cache
def prompt(family: int, length: int) -> tuple[int, ...]:
    """Families share a stem: 0 and 1 differ from token 40 on, 2 is another."""
    stem = prompt_of(40, 100) if family < 2 else []
    return tuple((stem + prompt_of(200, family))[:length])


@cache
def answer_alone(family: int, length: int, kind: int, seed_shift: int) -> Answer:
    params = params_of(kind)
    if params.seed is not None:
        params.seed += seed_shift
    return alone(list(prompt(family, length)), params)


def sizes_of(draw: st.DataObject) -> Sizes:
    unit, pages = draw.draw(st.sampled_from([(16, (16, 32, 64)), (4, (4, 8, 16)), (1, (1, 4))]))
    page = draw.draw(st.sampled_from(pages))
    layout = draw.draw(st.sampled_from(LAYOUTS))
    rows = draw.draw(st.integers(1, 6))
    num_pages = max(3, 1 + draw.draw(st.integers(60, 900)) // page)
    return Sizes(
        windows=layout["windows"],  # type: ignore[arg-type]
        pools=layout["pools"],  # type: ignore[arg-type]
        num_pages=tuple(num_pages * (1 + layout["pools"].count(p)) for p in range(max(layout["pools"]) + 1)),  # type: ignore[attr-defined]
        page_tokens=page,
        unit_tokens=unit,
        max_num_seqs=rows,
        max_num_batched_tokens=max(rows, draw.draw(st.sampled_from([1, 7, 16, 33, 64]))),
        max_in_flight=draw.draw(st.integers(1, 2)),
        buckets=draw.draw(st.booleans()),
        extra={
            "max_num_steps": draw.draw(st.sampled_from([1, 2, 8, 8])),
            "max_turn_rows": draw.draw(st.sampled_from([1, 2, 99])),
            "policy": draw.draw(st.sampled_from(["fcfs", "priority"])),
            "aging_steps": draw.draw(st.sampled_from([1, 20, 1024])),
            "enable_prefix_caching": draw.draw(st.sampled_from([True, True, False])),
            "long_prefill_token_threshold": draw.draw(st.sampled_from([0, 0, 5])),
            "max_preemptions": draw.draw(st.sampled_from([0, 1, 8])),
            "max_prompt_logprob_tokens": draw.draw(st.sampled_from([3, 1024])),
        },
    )


class CoreMachine(RuleBasedStateMachine):
    core: Core

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        self.failures: dict[int, StepFailed] = {}
        self.sizes = sizes_of(data)
        self.core = Core(self.sizes, fail_at=self.failures)
        self.asked: dict[int, tuple[int, int, int, int, bytes]] = {}  # key -> family, length, kind, index, domain
        self.requests: dict[int, Request] = {}
        self.some_failed = False
        self.plans: list[StepPlan] = []

    # rules

    @rule(
        family=st.integers(0, 2),
        length=st.sampled_from([1, 2, 15, 16, 17, 40, 63, 64, 65, 100, 128]),
        kind=st.integers(0, len(KINDS) - 1),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(-2, 2),
        domain=st.sampled_from(DOMAINS),
    )
    def add(self, family: int, length: int, kind: int, n: int, priority: int, domain: bytes) -> None:
        key = self.core.add(list(prompt(family, length)), params_of(kind, n), priority=priority, domain=domain)
        for i in range(n):
            self.asked[key + i] = (family, length, kind, i, domain)
        for entry in self.core.scheduler.state.waiting:
            self.requests[entry.request.key] = entry.request

    @rule(turns=st.integers(1, 12))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()

    def turn(self) -> None:
        scheduler = self.core.scheduler
        first = scheduler.state.running.slots[:1].tolist()
        oldest = scheduler.state.table.entry(first[0]).request if first else None
        before = None if oldest is None else oldest.num_preemptions
        self.core.step()
        assert oldest is None or oldest.num_preemptions == before, "the first in order was preempted"
        if scheduler.in_flight:
            self.check_plan(scheduler.in_flight[-1].plan)

    def check_plan(self, plan: StepPlan) -> None:
        """S-1."""
        assert 0 < plan.num_tokens <= self.core.config.max_num_batched_tokens
        assert 0 < plan.num_rows <= self.core.config.max_num_seqs
        assert (plan.num_new >= 1).all()
        scores = plan.prompt_logprobs
        assert scores is None or len(scores.targets) <= self.core.config.max_prompt_logprob_tokens

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.asked)), max_size=4))
        self.core.abort(*keys, 10**9)
        self.core.abort(*keys)  # twice, in any state

    @rule()
    def reset_prefix_cache(self) -> None:
        self.core.loop.handle(ResetPrefixCache(1))
        assert not any(len(table.index) for table in self.core.scheduler.state.kv.tables)

    @rule()
    def preempt(self) -> None:
        """Preemptions that nothing forced: S-8 must not notice. Never of the first in order."""
        for slot in self.core.scheduler.state.running.slots[1:].tolist():
            self.core.scheduler.state.preempt(slot)

    @rule(rows=st.sampled_from([(), (0,), (1, 0)]), cache_lost=st.booleans())
    def fail_next_step(self, rows: tuple[int, ...], cache_lost: bool) -> None:
        self.some_failed = True
        step_id = self.core.scheduler.state.counters.steps + 1
        self.failures[step_id] = StepFailed("injected", rows=rows, cache_lost=cache_lost)

    # what must hold

    @invariant()
    def integrity(self) -> None:
        self.core.scheduler.check_integrity()

    @invariant()
    def index_tells_the_truth(self) -> None:
        """P-7, P-8, P-13: every key is the chain of a known sequence in its domain, and its page holds those tokens."""
        kv, unit = self.core.scheduler.state.kv, self.sizes.unit_tokens
        if not any(len(table.index) for table in kv.tables):
            return
        if any(flight.plan.step_id in self.failures for flight in self.core.scheduler.in_flight):
            return  # keys of a step that has failed are withdrawn when its collect says so
        known: dict[bytes, tuple[int, np.ndarray]] = {}
        for request in self.requests.values():
            tokens = self.tokens_of(request)
            domain = request.domain
            if not self.core.config.enable_prefix_caching:
                domain += b"/n>1/%d" % (request.parent or 0)
            for i, key in enumerate(chain_keys(kv.root(domain), tokens, unit)):
                known[key] = (i, tokens[i * unit : (i + 1) * unit])
        for table in kv.tables:
            pool = self.core.runner._devices[0].pools[table.pool_id]
            for key, page in table.index.page_of.items():
                assert key in known, "a key that no sequence of its domain has"
                depth, tokens = known[key]
                at = depth % table.page_units * unit
                assert (pool.tokens[page, at : at + unit] == tokens).all(), f"page {page} holds other tokens"
                assert pool.fill[page] >= at + unit

    def tokens_of(self, request: Request) -> np.ndarray:
        slot = self.core.scheduler.state.slot_of.get(request.key)
        if slot is None:
            return request.all_tokens()
        table = self.core.scheduler.state.table
        return table.tokens[slot, : table.num_tokens[slot]].copy()

    def teardown(self) -> None:
        if not hasattr(self, "asked"):
            return
        for step_id in [step_id for step_id in self.failures if step_id > self.core.scheduler.state.counters.steps]:
            del self.failures[step_id]
        bound = 50 * (sum(256 for _ in self.asked) + len(self.asked)) + 50
        for _ in range(bound):
            if not self.core.loop.has_work:
                break
            self.turn()
            self.integrity()
        assert not self.core.loop.has_work, "S-5: work is left"
        for key in self.asked:
            if key not in self.core.aborted:
                self.check_answer(key)
        kv = self.core.scheduler.state.kv
        assert all(pool.num_free == pool.num_pages - 1 for pool in kv.pools), "P-11: pages are held by nobody"
        assert not kv.held_sources and not self.core.scheduler.state.prefix.computing

    def check_answer(self, key: int) -> None:
        family, length, kind, index, _ = self.asked[key]
        answer = self.core.answers[key]
        capacity = self.core.scheduler.state.capacity
        params = params_of(kind)
        if key not in self.requests:
            assert answer.error == "context_length_exceeded" or index > 0
            assert length + max(1, params.min_tokens) > capacity
            return
        if answer.error is not None:
            assert self.some_failed and answer.error == "step_failed"
            return
        expected = answer_alone(family, length, kind, index if params.seed is not None else 0)
        room = capacity - length
        assert answer.tokens == expected.tokens[:room], f"request {key} changed its answer"
        if params.logprobs is not None:
            assert answer.logprobs == expected.logprobs[:room]
        if len(expected.tokens) <= room:
            assert (answer.finish, answer.stop_token) == (expected.finish, expected.stop_token)
        else:
            assert answer.finish is FinishReason.LENGTH
        assert answer.finish is not FinishReason.STOP or answer.tokens[-1] in (EOS, *params.stop_token_ids)
        assert 0 <= answer.num_cached < length
        if params.prompt_logprobs is not None and length > 1 and index == 0:
            assert answer.prompt_logprobs == expected.prompt_logprobs


CoreMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestCore = CoreMachine.TestCase
