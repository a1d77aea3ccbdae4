"""A core of the real loop, scheduler and manager over the fake runner, whose next token is a hash of what it reads.

A wrong page, slot, length or order changes the output or raises InternalError: that is what makes S-8 a test.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np

from backends.fake import Runner
from engine.core.loop import CoreLoop, Loop
from engine.core.messages import AbortRequests, AddRequest, FromCore, LogprobColumns, RequestFailed, StepOutputs
from engine.core.replicas import ReplicaLoop, Replicas
from engine.executor.base import SameProcess
from engine.params import SamplingParams
from engine.request import FinishReason
from engine.runner import Placement, RunnerConfig, SamplerLimits
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.scheduler import Scheduler
from engine.specs.arch import ArchSpec, Attention, GatedFfn, LayerSpec, Norms
from engine.specs.cache import CacheLayout, GroupKind, GroupLayout, GroupSpec, PoolLayout

VOCAB = 97
EOS = 7
TO_CORE = msgspec.msgpack.Decoder(FromCore)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """windows: one group each, None = full. pools: pool of each group. num_pages: of each pool, null page included."""

    windows: tuple[int | None, ...] = (None,)
    pools: tuple[int, ...] = (0,)
    num_pages: tuple[int, ...] = (65,)
    page_tokens: int = 16
    unit_tokens: int = 16
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_model_len: int = 256
    max_in_flight: int = 2
    num_replicas: int = 1
    buckets: bool = True
    extra: dict[str, object] = field(default_factory=dict)


def arch() -> ArchSpec:
    norms = Norms(eps=1e-6)
    layer = LayerSpec(
        mixer=Attention(num_heads=1, num_kv_heads=1, head_size=8, scale=1.0, rope=None),
        ffn=GatedFfn(size=8),
        norms=norms,
    )
    return ArchSpec(
        family="llama",
        hidden_size=8,
        vocab_size=VOCAB,
        layers=(layer,),
        tied_embeddings=True,
        max_position=1 << 20,
        final_norm=norms,
        checkpoint_dtype="float32",
        eos_token_ids=(EOS,),
    )


def layout_of(sizes: Sizes) -> CacheLayout:
    groups = tuple(
        GroupLayout(
            spec=GroupSpec(
                kind=GroupKind.FULL if window is None else GroupKind.WINDOW,
                layers=(i,),
                num_kv_heads=1,
                head_size=8,
                window=window,
            ),
            pool=sizes.pools[i],
            page_tokens=sizes.page_tokens,
        )
        for i, window in enumerate(sizes.windows)
    )
    pools = tuple(
        PoolLayout(
            num_pages=num_pages,
            page_bytes=64 * sizes.page_tokens,
            num_layers=1,
            num_kv_heads=1,
            head_size=8,
            page_tokens=sizes.page_tokens,
        )
        for num_pages in sizes.num_pages
    )
    return CacheLayout(groups=groups, pools=pools, unit_tokens=sizes.unit_tokens)


def powers(last: int) -> tuple[int, ...]:
    values = [1]
    while values[-1] < last:
        values.append(min(2 * values[-1], last))
    return tuple(values)


def scheduler_config(sizes: Sizes) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=sizes.max_model_len,
        token_buckets=powers(sizes.max_num_batched_tokens) if sizes.buckets else (),
        row_buckets=powers(sizes.max_num_seqs) if sizes.buckets else (),
        max_in_flight=sizes.max_in_flight,
        vocab_size=VOCAB,
        **sizes.extra,  # type: ignore[arg-type]
    )


def make_runner(sizes: Sizes, config: SchedulerConfig, layout: CacheLayout, **options: object) -> Runner:
    runner = Runner(**{"eos_probability": 0.05, "page_tokens": sizes.page_tokens, **options})
    runner.configure(
        RunnerConfig(
            arch=arch(),
            dtype="float32",
            kv_dtype="float32",
            max_slots=config.max_num_seqs,
            max_model_len=config.max_model_len,
            page_tokens=tuple(group.page_tokens for group in layout.groups),
            token_buckets=config.token_buckets,
            row_buckets=config.row_buckets,
            max_in_flight=config.max_in_flight,
            max_num_steps=config.max_num_steps,
            max_turn_rows=config.max_turn_rows,
            num_replicas=sizes.num_replicas,
            sampler_limits=SamplerLimits(max_logprobs=config.max_logprobs),
        ),
        Placement(),
    )
    runner.load(None)
    runner.allocate_cache(layout)
    runner.warm_up()
    return runner


@dataclass(slots=True)
class Answer:
    """What a client has heard of one sequence."""

    tokens: list[int] = field(default_factory=list)
    finish: FinishReason = FinishReason.NONE
    stop_token: int = -1
    num_cached: int = -1
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: LogprobColumns | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not FinishReason.NONE or self.error is not None


class Core:
    """A CoreLoop over the fake runner, and what its clients have heard. Messages pass through msgpack, as in life."""

    def __init__(self, sizes: Sizes | None = None, **options: object) -> None:
        self.sizes = sizes or Sizes()
        self.config = scheduler_config(self.sizes)
        self.layout = layout_of(self.sizes)
        self.runner = make_runner(self.sizes, self.config, self.layout, **options)
        self.schedulers = [Scheduler(self.config, self.layout) for _ in range(self.sizes.num_replicas)]
        self.scheduler, depth = self.schedulers[0], self.sizes.max_in_flight
        self.loop: Loop
        if len(self.schedulers) == 1:
            self.loop = CoreLoop(self.scheduler, SameProcess(self.runner), depth)
        else:
            self.loop = ReplicaLoop(Replicas(self.schedulers), SameProcess(self.runner), depth)
        self.answers: dict[int, Answer] = {}
        self.aborted: set[int] = set()
        self.replies: list[int] = []
        self.next_key = 1

    def add(self, prompt: list[int], params: SamplingParams | None = None, **fields: object) -> int:
        """Queue a request. -> its key; a refusal shows as Answer.error after the next step."""
        params = params or SamplingParams(temperature=0.0, max_tokens=8)
        key, self.next_key = self.next_key, self.next_key + params.n
        stop_ids = list(params.stop_token_ids) + ([] if params.ignore_eos else [EOS])
        message = AddRequest(
            key=key,
            prompt=np.array(prompt, "<i4").tobytes(),
            params=params,
            stop_ids=stop_ids,
            eos_ids=[EOS],
            bad_word_ids=[],
            **fields,  # type: ignore[arg-type]
        )
        for i in range(params.n):
            self.answers[key + i] = Answer()
        self.loop.handle(message)
        return key

    def abort(self, *keys: int) -> None:
        self.aborted.update(keys)
        self.loop.handle(AbortRequests(list(keys)))

    def step(self) -> None:
        for message in self.loop.step():
            self.hear(TO_CORE.decode(msgspec.msgpack.encode(message)))

    def hear(self, message: FromCore) -> None:
        if isinstance(message, RequestFailed):
            answer = self.answers[message.key]
            assert not answer.ended, f"request {message.key} ends twice"
            answer.error = message.code
        elif isinstance(message, StepOutputs):
            self.hear_step(message)
        else:
            self.replies.append(message.call)  # type: ignore[union-attr]

    def hear_step(self, message: StepOutputs) -> None:
        keys, counts = np.frombuffer(message.keys, "<i8"), np.frombuffer(message.counts, "<i4")
        tokens = np.frombuffer(message.tokens, "<i4").tolist()
        finish, stops = np.frombuffer(message.finish, np.uint8), np.frombuffer(message.stop_token, "<i4")
        cached = np.frombuffer(message.num_cached, "<i4")
        chosen = None if message.logprobs is None else np.frombuffer(message.logprobs.chosen, "<f4")
        assert len(keys) == len(counts) == len(finish) == len(stops) == len(cached)
        assert len(tokens) == counts.sum()
        at = 0
        for i, key in enumerate(keys.tolist()):
            answer = self.answers[key]
            assert key not in self.aborted, f"output for the aborted request {key}"
            assert not answer.ended, f"output after the end of request {key}"
            new = tokens[at : at + counts[i]]
            assert all(0 <= token < VOCAB for token in new), "a placeholder reached the client"
            answer.tokens += new
            if chosen is not None:
                answer.logprobs += chosen[at : at + counts[i]].tolist()
            at += int(counts[i])
            answer.finish, answer.stop_token = FinishReason(int(finish[i])), int(stops[i])
            answer.num_cached = int(cached[i])
        for key, columns in (message.prompt_logprobs or {}).items():
            assert self.answers[key].prompt_logprobs is None
            self.answers[key].prompt_logprobs = columns

    def run(self, max_steps: int = 2000, *, check: bool = True) -> None:
        """Until nothing is left to do."""
        for _ in range(max_steps):
            if not self.loop.has_work:
                return
            self.step()
            if check:
                for scheduler in self.schedulers:
                    scheduler.check_integrity()
        raise AssertionError(f"work is left after {max_steps} steps")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(8, VOCAB, length).tolist()


def alone(prompt: list[int], params: SamplingParams, **fields: object) -> Answer:
    """What a request answers when nobody else is there: one full group, plenty of pages, no overlap, no cache."""
    core = Core(Sizes(num_pages=(65,), max_in_flight=1, extra={"enable_prefix_caching": False}))
    key = core.add(prompt, params, **fields)
    core.run(check=False)
    return core.answers[key]
