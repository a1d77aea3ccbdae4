"""Drives a runner by hand: sequences with slots and pages of their own choosing, and plans made from them.

Used by the conformance suite and the rehearsal in place of a scheduler: it holds no policy, so a test can choose every
chunk, slot, page and bucket. A plan that is wrong on purpose is made with `dataclasses.replace`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.runner import Capability, ModelRunner, Placement, RunnerConfig, StepHandle
from engine.specs.arch import ArchSpec, Attention, GatedFfn, LayerSpec, Norms, RopeSpec
from engine.specs.cache import CacheLayout, GroupKind, GroupLayout, GroupSpec, PoolLayout, cache_groups
from engine.step import (
    I32,
    LAST_TOKEN,
    Bucket,
    Drafts,
    OpenedRows,
    PageCopies,
    PageDelta,
    Ragged,
    Sampler,
    SamplingTable,
    StepPlan,
    StepResult,
)

PAGE = 16
DEVICE = os.environ.get("TWINFER_TEST_DEVICE", "cpu")  # cuda: the suite on a GPU; xla: through torch-xla


def llama(
    *, vocab_size: int = 199, windows: tuple[int | None, ...] = (None, None), eos: tuple[int, ...] = ()
) -> ArchSpec:
    """A tiny Llama-shaped model; the vocabulary is no multiple of 4 or 32 on purpose."""
    norms = Norms(eps=1e-6)
    rope = RopeSpec(rotary_size=16, max_position=512)
    layers = tuple(
        LayerSpec(
            mixer=Attention(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25, rope=rope, window=window),
            ffn=GatedFfn(size=96),
            norms=norms,
        )
        for window in windows
    )
    return ArchSpec(
        family="llama",
        hidden_size=64,
        vocab_size=vocab_size,
        layers=layers,
        tied_embeddings=True,
        max_position=512,
        final_norm=norms,
        checkpoint_dtype="float32",
        eos_token_ids=eos,
    )


@dataclass(slots=True, kw_only=True)
class Sampling:
    """One row of a SamplingTable, neutral by default (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    max_outputs: int = 1 << 20
    num_logprobs: int = -1
    stop_ids: tuple[int, ...] = ()
    bias: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def uses_history(self) -> bool:
        return bool(self.bad_words) or (self.presence, self.frequency, self.repetition) != (0, 0, 1)

    @property
    def greedy(self) -> bool:
        return not (self.temperature or self.uses_history or self.min_tokens or self.bias or self.allowed)


@dataclass(slots=True, eq=False)
class Seq:
    """A sequence. tokens: what the host knows; planned: tokens that submitted steps compute (upper bound)."""

    tokens: list[int]
    num_prompt: int
    sampling: Sampling
    slot: int
    generation: int
    pages: list[list[int]]  # per group
    planned: int = 0
    unknown: int = 0  # sampled tokens that the host has not collected
    opened: bool = False
    pending: list[tuple[int, int, int]] = field(default_factory=list)  # (group, column, page) not in the table yet
    borrowed: set[tuple[int, int]] = field(default_factory=set)  # (group, page) that are not its own to give back
    logprobs: list[float] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def left(self) -> int:
        """Tokens known to exist that no submitted step computes."""
        return len(self.tokens) + self.unknown - self.planned


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    starts = np.cumsum([0] + [len(x) for x in lists]).astype(np.int32)
    return Ragged(values=np.array([v for x in lists for v in x], np.int32), starts=starts)


def optional(lists: Sequence[Sequence[int]]) -> Ragged | None:
    return ragged(lists) if any(len(x) for x in lists) else None


def sampling_table(seqs: Sequence[Seq]) -> SamplingTable:
    rows = [s.sampling for s in seqs]
    words = [w for r in rows for w in r.bad_words]
    history = [s.tokens if s.sampling.uses_history else [] for s in seqs]
    bias = optional([list(r.bias) for r in rows])

    def f32(name: str) -> np.ndarray:
        return np.array([getattr(r, name) for r in rows], np.float32)

    def i32(values: Sequence[int]) -> I32:
        return np.array(values, np.int32)

    return SamplingTable(
        temperature=f32("temperature"),
        top_p=f32("top_p"),
        min_p=f32("min_p"),
        top_k=i32([r.top_k for r in rows]),
        presence_penalty=f32("presence"),
        frequency_penalty=f32("frequency"),
        repetition_penalty=f32("repetition"),
        seed=np.array([r.seed % 2**64 for r in rows], np.uint64),
        num_outputs=i32([len(s.outputs) for s in seqs]),
        min_tokens=i32([r.min_tokens for r in rows]),
        max_outputs=i32([r.max_outputs for r in rows]),
        num_logprobs=i32([r.num_logprobs for r in rows]),
        stop_ids=ragged([r.stop_ids for r in rows]),
        bias_ids=bias,
        bias_values=None if bias is None else np.array([v for r in rows for v in r.bias.values()], np.float32),
        allowed_ids=optional([r.allowed for r in rows]),
        bad_words=ragged(words) if words else None,
        bad_word_starts=np.cumsum([0] + [len(r.bad_words) for r in rows]).astype(np.int32) if words else None,
        history=optional(history),
        num_prompt=i32([s.num_prompt if h else 0 for s, h in zip(seqs, history, strict=True)])
        if any(history)
        else None,
    )


class Driver:
    """A runner brought to life, with pages and slots handed out at random (by `seed`), never in order."""

    def __init__(
        self,
        runner: ModelRunner,
        arch: ArchSpec | None = None,
        *,
        seed: int = 0,
        groups: tuple[GroupSpec, ...] | None = None,
        warm: bool = True,
        checkpoint: Path | None = None,
        **config: Any,
    ) -> None:
        self.runner, self.arch = runner, llama() if arch is None else arch
        self.random = random.Random(seed)
        self.device = runner.describe(config.get("device", DEVICE))
        groups = cache_groups(self.arch) if groups is None else groups
        compiled = self.device.bucket_style == "pow2"
        values: dict[str, Any] = {
            "arch": self.arch,
            "dtype": "float32",
            "kv_dtype": "float32",
            "max_slots": 12,
            "max_model_len": 128,
            "page_tokens": (PAGE,) * len(groups),
            "token_buckets": (8, 64) if compiled else (),
            "row_buckets": (4, 12) if compiled else (),
            "max_in_flight": min(2, self.device.max_in_flight),
            "max_num_steps": 8 if Capability.MULTI_STEP in self.device.capabilities else 1,
            "load_format": "dummy",
            "device": DEVICE,
            "num_threads": 1,
        }
        self.config = RunnerConfig(**(values | config))
        page = self.config.page_tokens[0]
        self.layout = replace(layout(groups, 64, page, self.config.tensor_size), kv_dtype=self.config.kv_dtype)
        runner.configure(self.config, Placement())
        runner.load(checkpoint)
        self.budget_bytes = runner.cache_budget_bytes()
        runner.allocate_cache(self.layout)
        if warm:
            runner.warm_up()
        self.step_id = 0
        self.free_slots = list(range(self.config.max_slots))
        self.free_pages = [list(range(1, pool.num_pages)) for pool in self.layout.pools]
        self.generation = 0
        self.closing: list[int] = []
        self.rows_of: dict[int, list[tuple[Seq, int]]] = {}  # with the most tokens that the row may sample
        self.live: list[Seq] = []
        self.in_flight: list[StepHandle] = []

    # sequences

    def new(self, prompt: Sequence[int], *, slot: int | None = None, **sampling: Any) -> Seq:
        """A sequence with a slot of its own; it is opened by the first plan that names it."""
        if slot is None:
            slot = self.random.choice(self.free_slots)
        self.free_slots.remove(slot)
        self.generation += 1
        pages: list[list[int]] = [[] for _ in self.layout.groups]
        seq = Seq(list(prompt), len(prompt), Sampling(**sampling), slot, self.generation, pages)
        self.live.append(seq)
        return seq

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(self.arch.vocab_size) for _ in range(length)]

    def close(self, seq: Seq) -> None:
        """End the tenancy with the next plan and give back what the sequence holds."""
        if seq.opened:
            self.closing.append(seq.slot)
        self.free_slots.append(seq.slot)
        self.live.remove(seq)
        for g, (group, pages) in enumerate(zip(self.layout.groups, seq.pages, strict=True)):
            self.free_pages[group.pool] += [p for p in pages if (g, p) not in seq.borrowed]
        seq.pages = [[] for _ in self.layout.groups]

    def clean_up(self) -> None:
        """Back to nothing running, whatever a test left."""
        while self.in_flight:
            self.runner.collect(self.in_flight.pop(0))
        self.rows_of.clear()
        for seq in list(self.live):
            self.close(seq)

    def preempt(self, seq: Seq) -> Seq:
        """The same request again with nothing computed, in another tenancy."""
        again = self.new(seq.tokens, **{f.name: getattr(seq.sampling, f.name) for f in fields(Sampling)})
        again.num_prompt = seq.num_prompt
        self.close(seq)
        return again

    def share(self, seq: Seq, source: Seq, tokens: int) -> PageCopies | None:
        """Let a new sequence read the first `tokens` of another: whole pages by reference, a partial one by copy."""
        copies = []
        for g, (group, mine, theirs) in enumerate(zip(self.layout.groups, seq.pages, source.pages, strict=True)):
            whole, part = divmod(tokens, group.page_tokens)
            mine += theirs[:whole]
            seq.borrowed |= {(g, page) for page in mine}
            if part:
                mine.append(self.take_page(group.pool))
                copies.append((group.pool, theirs[whole], mine[-1], part))
            seq.pending += [(g, column, page) for column, page in enumerate(mine)]
        seq.planned = tokens
        if not copies:
            return None
        pool, origin, target, count = np.array(copies, np.int32).T.copy()
        return PageCopies(pool=pool, source=origin, target=target, tokens=count)

    def take_page(self, pool: int) -> int:
        pages = self.free_pages[pool]
        return pages.pop(self.random.randrange(len(pages)))

    def grow(self, seq: Seq, tokens: int) -> list[list[tuple[int, int, int]]]:
        """Pages for `tokens` tokens. -> per group, table entries (slot, column, page) that are new."""
        entries: list[list[tuple[int, int, int]]] = []
        for group, pages in zip(self.layout.groups, seq.pages, strict=True):
            new = []
            while group.spec.kind in (GroupKind.FULL, GroupKind.WINDOW) and len(pages) * group.page_tokens < tokens:
                pages.append(self.take_page(group.pool))
                new.append((seq.slot, len(pages) - 1, pages[-1]))
            entries.append(new)
        for g, column, page in seq.pending:
            entries[g].append((seq.slot, column, page))
        seq.pending = []
        return entries

    # plans

    def plan(self, rows: Sequence[tuple[Seq, int]], *, num_steps: int = 1, **parts: Any) -> StepPlan:
        """One step: each sequence gets its next n tokens. Samples where that reaches the sequence's end."""
        opened = [seq for seq, _ in rows if not seq.opened]
        entries: list[list[tuple[int, int, int]]] = [[] for _ in self.layout.groups]
        token_ids: list[int] = []
        positions: list[int] = []
        computed, samples = [], []
        for seq, n in rows:
            for mine, new in zip(entries, self.grow(seq, seq.planned + n + num_steps - 1), strict=True):
                mine += new
            known = seq.tokens[seq.planned : seq.planned + n]
            token_ids += known + [LAST_TOKEN] * (n - len(known))
            positions += range(seq.planned, seq.planned + n)
            computed.append(seq.planned)
            samples.append(n == seq.left)
        fresh = self.opened_rows(opened) if opened else None
        for seq, n in rows:
            seq.opened = True
            seq.planned += n + num_steps - 1
        for (seq, _), sample in zip(rows, samples, strict=True):
            seq.unknown += num_steps if sample else 0
        num_new = np.array([n for _, n in rows], np.int32)
        sampling = [seq for (seq, _), s in zip(rows, samples, strict=True) if s]
        greedy = all(seq.sampling.greedy for seq in sampling)
        plan = StepPlan(
            step_id=self.next_step(),
            bucket=self.bucket(len(token_ids), len(rows)),
            num_steps=num_steps,
            slots=np.array([seq.slot for seq, _ in rows], np.int32),
            generation=np.array([seq.generation for seq, _ in rows], np.int32),
            num_computed=np.array(computed, np.int32),
            num_new=num_new,
            num_logits=np.array(samples, np.int32),
            token_ids=np.array(token_ids, np.int32),
            positions=np.array([positions], np.int32).reshape(1, -1),
            logit_rows=(np.cumsum(num_new)[np.array(samples, np.bool_)] - 1).astype(np.int32),
            sampler=Sampler.NONE if not sampling else Sampler.GREEDY if greedy else Sampler.FULL,
            num_logprobs=max((seq.sampling.num_logprobs for seq in sampling), default=-1),
            opened=fresh,
            closed=np.array(self.closing, np.int32) if self.closing else None,
            page_deltas=deltas(entries),
        )
        self.closing = []
        self.rows_of[plan.step_id] = [
            (seq, num_steps if sample else 0) for (seq, _), sample in zip(rows, samples, strict=True)
        ]
        return replace(plan, **parts)

    def draft_plan(self, rows: Sequence[tuple[Seq, Sequence[int]]], parents: Sequence[Sequence[int]] = ()) -> StepPlan:
        """One decode step in which every row brings drafts (ids, or draft_token(i)); parents make trees of them."""
        wanted = [(seq, [seq.tokens[seq.planned] if seq.left == 1 and not seq.unknown else LAST_TOKEN, *ids])
                  for seq, ids in rows]  # fmt: skip
        depths = [[0] for _ in rows]
        for r, (_, ids) in enumerate(rows):
            above = parents[r] if parents else range(-1, len(ids) - 1)
            for parent in above:
                depths[r].append(depths[r][parent + 1] + 1)
        width = max(len(ids) for _, ids in rows)
        tree = np.full((len(rows), width), -1, np.int32)
        for r, above in enumerate(parents):
            tree[r, : len(above)] = above
        entries = [self.grow(seq, seq.planned + 1 + len(ids)) for seq, ids in rows]
        counts = np.array([1 + len(ids) for _, ids in rows], np.int32)
        positions = [seq.planned + depth for (seq, _), row in zip(rows, depths, strict=True) for depth in row]
        plan = StepPlan(
            step_id=self.next_step(),
            bucket=self.bucket(int(counts.sum()), len(rows)),
            slots=np.array([seq.slot for seq, _ in rows], np.int32),
            generation=np.array([seq.generation for seq, _ in rows], np.int32),
            num_computed=np.array([seq.planned for seq, _ in rows], np.int32),
            num_new=counts,
            num_logits=counts.copy(),
            token_ids=np.array([t for _, ids in wanted for t in ids], np.int32),
            positions=np.array([positions], np.int32),
            logit_rows=np.arange(counts.sum(), dtype=np.int32),
            sampler=Sampler.GREEDY if all(seq.sampling.greedy for seq, _ in rows) else Sampler.FULL,
            num_logprobs=max(seq.sampling.num_logprobs for seq, _ in rows),
            page_deltas=deltas([[e for row in entries for e in row[g]] for g in range(len(self.layout.groups))]),
            drafts=Drafts(num_drafts=counts - 1, parents=tree if parents else None),
        )
        for seq, ids in rows:
            seq.planned += 1 + len(ids)
            seq.unknown += 1 + len(ids)
        self.rows_of[plan.step_id] = [(seq, 1 + len(ids)) for seq, ids in rows]
        return plan

    def next_step(self) -> int:
        self.step_id += 1
        return self.step_id

    def opened_rows(self, seqs: Sequence[Seq]) -> OpenedRows:
        return OpenedRows(
            slots=np.array([s.slot for s in seqs], np.int32),
            generation=np.array([s.generation for s in seqs], np.int32),
            num_computed=np.array([s.planned for s in seqs], np.int32),
            sampling=sampling_table(seqs),
        )

    def bucket(self, tokens: int, rows: int) -> Bucket:
        """The smallest configured bucket that fits."""
        fit_tokens = [b for b in self.config.token_buckets if b >= tokens] or [tokens]
        fit_rows = [b for b in self.config.row_buckets if b >= rows] or [rows]
        return Bucket(tokens=fit_tokens[0], rows=fit_rows[0])

    # steps

    def step(self, rows: Sequence[tuple[Seq, int]], **parts: Any) -> StepResult:
        """Plan, submit, collect, and take the tokens."""
        return self.collect(self.submit(self.plan(rows, **parts)))

    def submit(self, plan: StepPlan) -> StepHandle:
        self.in_flight.append(self.runner.submit([plan]))
        return self.in_flight[-1]

    def collect(self, handle: StepHandle) -> StepResult:
        self.in_flight.remove(handle)
        (result,) = self.runner.collect(handle)
        self.take(result)
        return result

    def take(self, result: StepResult) -> None:
        for r, (seq, most) in enumerate(self.rows_of.pop(result.step_id)):
            count, width = int(result.num_sampled[r]), result.tokens.shape[1]
            seq.tokens += result.tokens[r, :count].tolist()
            seq.errors.append(int(result.error[r]))
            seq.unknown -= most
            seq.planned -= most - count  # the device stopped the row, or rejected its drafts
            if result.logprobs is not None:
                seq.logprobs += result.logprobs.chosen[r * width : r * width + count].tolist()

    def generate(self, seqs: Sequence[Seq], num_outputs: int, chunk: int = 48) -> list[list[int]]:
        """Run all sequences to `num_outputs` outputs, prefilled in chunks of at most `chunk` tokens a step."""
        while todo := [s for s in seqs if len(s.outputs) < num_outputs]:
            rows: list[tuple[Seq, int]] = []
            room = chunk
            for seq in todo:
                n = min(seq.left, room)
                if n:
                    rows.append((seq, n))
                    room -= n
            self.step(rows)
        return [s.outputs for s in seqs]


def deltas(entries: list[list[tuple[int, int, int]]]) -> tuple[PageDelta | None, ...]:
    if not any(entries):
        return ()
    result: list[PageDelta | None] = []
    for new in entries:
        table = np.array(new, np.int32).reshape(-1, 3)
        part = PageDelta(slots=table[:, 0].copy(), columns=table[:, 1].copy(), pages=table[:, 2].copy())
        result.append(part if new else None)
    return tuple(result)


def layout(groups: tuple[GroupSpec, ...], num_pages: int, page: int = PAGE, ranks: int = 1) -> CacheLayout:
    """Groups whose pages have one shape share a pool; cross and state groups have pools of their own. float32."""
    pools: list[PoolLayout] = []
    pool_of: dict[tuple[int, int, int], int] = {}
    placed = []
    for group in groups:
        shape = (len(group.layers), group.num_kv_heads, group.head_size)
        alone = group.kind in (GroupKind.CROSS, GroupKind.STATE)
        if alone or shape not in pool_of:
            layers, heads, size = shape[0], max(1, shape[1] // ranks), shape[2]
            pools.append(
                PoolLayout(
                    num_pages=num_pages,
                    page_bytes=2 * 4 * page * layers * heads * size,
                    num_layers=layers,
                    num_kv_heads=heads,
                    head_size=size,
                    page_tokens=page,
                )
            )
            if not alone:
                pool_of[shape] = len(pools) - 1
        pool = len(pools) - 1 if alone else pool_of[shape]
        placed.append(GroupLayout(spec=group, pool=pool, page_tokens=page))
    return CacheLayout(groups=tuple(placed), pools=tuple(pools))
