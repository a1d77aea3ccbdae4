"""The JAX runner: engine/runner.py's ModelRunner over programs that were all compiled at warm-up.

A step is a few program calls on device state that each call donates to the next: table updates, page copies, one
forward program, and a sampling program unless the step is greedy. `submit` packs the plan and returns; jax runs behind.
Always true: steps reach the device in the order of submission; one that waits for its mask holds up those behind it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from backends.jax import compile_cache, mesh
from backends.jax.aot import Bundle
from backends.jax.load import load_weights
from backends.jax.programs import DeviceState, ProgramSet
from backends.jax.quant_weights import any_widened, check_alike
from backends.jax.replicas import merge_calls, part_of, together
from backends.jax.updates import Call, copy_calls, open_calls, page_calls
from backends.jax.weights import param_bytes
from backends.jax.workspace import workspace_bytes
from engine.errors import ConfigError, StepFailed, check, fail
from engine.opened import Use, is_poisoned, row_uses
from engine.plan_rules import check_buckets, check_plan, check_replicas
from engine.runner import DeviceInfo, Placement, Progress, RunnerConfig
from engine.specs.cache import CacheLayout
from engine.step import I32, U32, Event, Logprobs, OpenedRows, RowError, Sampler, StepPlan, StepResult

CLOSED = -1
BROKEN = -2  # a slot of a lost cache: may be closed or opened, not used
log = logging.getLogger("twinfer.jax")

LOST = "the KV cache is gone"


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """Opaque to the engine; equal only to itself."""

    step_id: int


@dataclass(slots=True, eq=False)
class Part:
    """One replica's part of a step. Holds copies of what it needs of its plan."""

    num_rows: int
    sampling_rows: I32  # rows that sample
    slots: I32  # of the sampling rows
    sampler: Sampler
    uses: Use
    num_logprobs: int
    late: bool
    poisoned: I32  # rows whose tables held ids outside the vocabulary
    calls: list[Call]  # table updates, before the forward program
    packed: I32
    scored: tuple[I32, I32, int] | None  # prompt logprobs: token indexes, targets, top entries
    num_steps: int
    mask: U32 | None = None

    @property
    def is_drawn(self) -> bool:
        """The sampling program is needed: the forward program has not sampled."""
        plain = self.sampler is Sampler.GREEDY and not self.late and self.num_logprobs < 0
        return len(self.slots) > 0 and not plain


@dataclass(slots=True, eq=False)
class Step:
    """A step between submit and collect."""

    handle: Handle
    tokens: int  # bucket
    parts: list[Part]  # one a replica
    masked: bool = False  # its late mask has come
    begun: bool = False
    ended: bool = False
    flags: Any = None  # device i32 [3, S]
    logits: Any = None
    sampled: Any = None  # device ids and scores of the sampling program, or of several turns
    prompt_scores: list[Any] = field(default_factory=list)
    failure: StepFailed | None = None

    @property
    def turning(self) -> bool:
        """Several turns of some replica: then all rows of all decode, and the program of turns takes them."""
        return any(part.num_steps > 1 for part in self.parts)

    @property
    def late(self) -> bool:
        return any(part.late for part in self.parts)


class Runner:
    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._params: dict[str, Any] = {}
        self._programs: ProgramSet | None = None
        self._state: DeviceState | None = None

    # life

    def describe(self, device: str = "auto") -> DeviceInfo:
        return mesh.describe(mesh.local(device))

    def configure(self, config: RunnerConfig, place: Placement) -> None:
        for name, value, only in (
            ("process_count", place.process_count, 1),
            ("tensor_size", place.tensor_size, 1),
        ):
            if value != only:
                raise ConfigError(f"{name}: {value} is not supported by the jax backend yet; expected {only}")
        if not config.token_buckets or not config.row_buckets:
            raise ConfigError("token_buckets and row_buckets: () is not accepted; jax compiles a program a shape")
        if config.num_threads and config.num_threads != len(os.sched_getaffinity(0)):
            # the pool exists since jax started; CPUs can be taken from it from outside only
            log.warning("num_threads: jax uses every CPU of the process; limit it with taskset -c")
        self._config = config
        compile_cache.enable()
        self._target = mesh.local(config.device)
        self._split = self._target.split(config.tensor_size, config.num_replicas)
        check_alike(config.arch, self._split.platform)
        if any_widened(config.arch, self._split.platform):
            log.warning("quantization: weights are kept in the activations' type, as large as plain ones")
        mesh.keep_float32_exact(self._split.device, config.dtype)
        self._bundle = Bundle.open(Path(config.executables), config, self._split) if config.executables else None
        shape = (config.num_replicas, config.max_slots)
        self._generation = np.full(shape, CLOSED, np.int64)
        self._uses = np.zeros(shape, np.int32)
        self._poisoned = np.zeros(shape, np.bool_)

    def load(self, checkpoint: Path | None, progress: Progress | None = None) -> None:
        self._params = load_weights(self._config, checkpoint, self._split, progress)

    def memory_plan(self, config: RunnerConfig) -> dict[str, int]:
        return {}

    def memory_peak(self) -> int:
        return 0

    def cache_budget_bytes(self) -> int:
        total, free = self._target.memory()
        workspace = self._workspace_bytes()
        if self._split.platform == "cpu":
            return max(0, (free - workspace) // mesh.HOST_SHARE // len(self._split.devices))
        return max(0, total - param_bytes(self._params) - workspace)

    def _workspace_bytes(self) -> int:
        if self._bundle is not None:
            return self._bundle.manifest.workspace_bytes
        return workspace_bytes(self._config, self._params, self._split)

    def allocate_cache(self, layout: CacheLayout) -> None:
        load = None if self._bundle is None else self._bundle.load
        self._programs = ProgramSet(self._config, layout, self._params, self._split, load)
        self._state = self._programs.fresh_state()

    def warm_up(self, progress: Progress | None = None) -> None:
        self._ready().compile(progress or (lambda phase, done, total: None))

    def num_compiles(self) -> int:
        return 0 if self._programs is None else self._programs.num_compiles

    def shutdown(self) -> None:
        self._steps.clear()
        self._params, self._programs, self._state = {}, None, None

    def _ready(self) -> ProgramSet:
        if self._programs is None:
            fail("allocate_cache comes first")
        return self._programs

    # steps

    def submit(self, plans: Sequence[StepPlan]) -> Handle:
        programs = self._ready()
        check(len(self._steps) < self._config.max_in_flight, f"{len(self._steps)} steps are in flight already")
        check_replicas(plans, self._config)
        for plan in plans:
            check_plan(plan, self._config)
            check_buckets(plan, self._config)
        turning = any(plan.num_steps > 1 for plan in plans)
        parts = [
            self._describe_part(r, plan, self._table_calls(r, plan), programs, turning) for r, plan in enumerate(plans)
        ]
        step = Step(Handle(plans[0].step_id), programs.packer(plans[0].bucket).shape.tokens, parts)
        self._steps.append(step)
        self._advance()
        return step.handle

    def provide_mask(self, handle: Handle, rows: I32, bits: U32) -> None:
        """rows: counted over all replicas, one after another."""
        step = self._find(handle)
        check(step.late, f"step {handle.step_id} was not submitted with a late mask")
        check(not step.masked, f"step {handle.step_id} has its mask already")
        words = -(-self._config.arch.vocab_size // 32)
        check(bits.shape == (len(rows), words), f"mask bits {bits.shape} for {len(rows)} rows of {words} words")
        total = sum(part.num_rows for part in step.parts)
        check(not len(rows) or (rows.min() >= 0 and rows.max() < total), f"mask rows {rows.tolist()}")
        by_row = np.full((total, words), 0xFFFFFFFF, np.uint32)
        by_row[rows] = bits
        first = 0
        for part in step.parts:
            part.mask = by_row[first : first + part.num_rows][part.sampling_rows]
            part.uses |= Use.MASK if len(rows) else Use.NONE
            first += part.num_rows
        step.masked = True
        self._advance()

    def collect(self, handle: Handle) -> Sequence[StepResult]:
        step = self._find(handle)
        check(step is self._steps[0], f"step {handle.step_id} is collected before {self._steps[0].handle.step_id}")
        check(step.ended or step.masked or not step.late, f"step {handle.step_id} waits for its mask")
        self._steps.pop(0)
        if step.failure is not None:
            raise step.failure
        try:
            return self._results(step)
        except jax.errors.JaxRuntimeError as error:
            raise self._lose(error) from error

    def poll(self) -> list[Event]:
        return []

    def _find(self, handle: Handle) -> Step:
        for step in self._steps:
            if step.handle is handle:
                return step
        fail(f"step {handle.step_id} is not in flight")

    def _table_calls(self, replica: int, plan: StepPlan) -> list[Call]:
        """Calls for tenancies and page copies; keeps the host's mirror of the slots."""
        calls: list[Call] = []
        config, generation = self._config, self._generation[replica]
        if plan.closed is not None:
            is_open = generation[plan.closed] != CLOSED
            check(is_open.all(), f"step {plan.step_id} closes slots {plan.closed[~is_open].tolist()}: not open")
            generation[plan.closed] = CLOSED
        if plan.opened is not None:
            self._open(replica, plan.opened)
            calls += open_calls(plan.opened, config.sampler_limits, config.arch.vocab_size, config.max_slots)
        same = generation[plan.slots] == plan.generation
        check(same.all(), f"step {plan.step_id} uses slots {plan.slots[~same].tolist()} of another generation")
        if plan.copies is not None:
            calls += copy_calls(plan.copies)
        return calls

    def _open(self, replica: int, opened: OpenedRows) -> None:
        self._generation[replica, opened.slots] = opened.generation
        for i, slot in enumerate(opened.slots.tolist()):
            self._uses[replica, slot] = row_uses(opened.sampling, i)
            self._poisoned[replica, slot] = is_poisoned(opened.sampling, i, self._config.arch.vocab_size)

    def _describe_part(
        self, replica: int, plan: StepPlan, calls: list[Call], programs: ProgramSet, turning: bool
    ) -> Part:
        """A replica's part of the step, with everything copied out of the plan. turning: see Step."""
        sampling_rows = np.flatnonzero(plan.num_logits).astype(np.int32)
        slots = plan.slots[sampling_rows]
        uses = Use.NONE
        if plan.sampler is Sampler.FULL or plan.late_mask:
            uses = Use(int(np.bitwise_or.reduce(self._uses[replica, slots], initial=0)))
        if plan.num_logprobs >= 0:
            uses |= Use.LOGPROBS
        # a step of several turns has the sampler in its program
        greedy = not turning and plan.sampler is Sampler.GREEDY and not plan.late_mask and plan.num_logprobs < 0
        packer = programs.packer(plan.bucket)
        riding = []
        for group in range(len(programs.layout.groups)):
            delta = plan.page_deltas[group] if plan.page_deltas else None
            if delta is not None and len(delta.slots) > packer.shape.deltas:
                calls += page_calls(group, delta, self._config.max_slots)
                delta = None
            riding.append(delta)
        scored = plan.prompt_logprobs
        return Part(
            num_rows=plan.num_rows,
            sampling_rows=sampling_rows,
            slots=slots,
            sampler=plan.sampler,
            uses=uses,
            num_logprobs=plan.num_logprobs,
            late=plan.late_mask,
            poisoned=self._poisoned_rows(replica, plan),
            calls=calls,
            packed=packer.pack(plan, tuple(riding), greedy),
            scored=None if scored is None else (scored.token_idx.copy(), scored.targets.copy(), scored.num_top),
            num_steps=plan.num_steps,
        )

    def _poisoned_rows(self, replica: int, plan: StepPlan) -> I32:
        """Rows that name an id outside the vocabulary in their tables, or as the target of a prompt logprob."""
        poisoned = self._poisoned[replica, plan.slots]
        if plan.prompt_logprobs is not None:
            targets, index = plan.prompt_logprobs.targets, plan.prompt_logprobs.token_idx
            outside = (targets < 0) | (targets >= self._config.arch.vocab_size)
            poisoned[np.searchsorted(np.cumsum(plan.num_new), index[outside], side="right")] = True
        return np.flatnonzero(poisoned).astype(np.int32)

    def _advance(self) -> None:
        """Hand to the device what can go, in order."""
        for step in self._steps:
            if step.ended:
                continue
            try:
                if not step.begun:
                    self._begin(step)
                if step.late and not step.masked:
                    return
                self._finish(step)
            except (jax.errors.JaxRuntimeError, RuntimeError) as error:
                step.failure = self._lose(error)
            step.ended = True

    def _begin(self, step: Step) -> None:
        """Table updates, copies, the forward program, and the scores of prompt tokens."""
        programs, state = self._ready(), self._device_state()
        step.begun = True
        for name, arrays in merge_calls([part.calls for part in step.parts], self._config.max_slots):
            programs.update(state, name, arrays)
        packed = together([part.packed for part in step.parts])
        if step.turning:
            uses = int(np.bitwise_or.reduce([int(part.uses) for part in step.parts]))
            most_rows = max(part.num_rows for part in step.parts)
            control = [(part.num_steps, uses, most_rows) for part in step.parts]
            step.sampled = programs.turns(state, step.tokens, packed, np.array(control, np.int32).reshape(-1))
            self._fetch_early(step.sampled[0])
            return
        step.logits, hidden, step.flags = programs.forward(state, step.tokens, packed)
        self._fetch_early(step.flags)
        if any(part.scored is not None for part in step.parts):
            none = np.zeros(0, np.int32)
            wanted = [(none, none) if part.scored is None else part.scored[:2] for part in step.parts]
            step.prompt_scores = programs.score(hidden, step.tokens, wanted)

    def _finish(self, step: Step) -> None:
        """The sampling program, unless the forward program has sampled or no row samples."""
        drawn = [part for part in step.parts if part.is_drawn]
        if drawn and not step.turning:
            none = np.zeros(0, np.int32)
            rows = [(part.slots, part.mask) if part.is_drawn else (none, None) for part in step.parts]
            uses = Use(int(np.bitwise_or.reduce([int(part.uses) for part in drawn])))
            step.sampled = self._ready().sample(self._device_state(), step.logits, rows, uses)
            self._fetch_early(step.sampled[0])
        step.logits = None

    def _fetch_early(self, result: jax.Array) -> None:
        """On its way to the host as soon as it is there: asked for after the step it takes 0.4 ms on an H200."""
        if self._split.platform != "cpu":
            result.copy_to_host_async()

    def _device_state(self) -> DeviceState:
        if self._state is None:
            fail("allocate_cache comes first")
        return self._state

    def _lose(self, error: Exception) -> StepFailed:
        """The failed program had been given the cache: begin again with empty pages and closed slots."""
        self._state = self._ready().fresh_state()
        self._generation[self._generation != CLOSED] = BROKEN
        return StepFailed(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}; {LOST}", cache_lost=True)

    # results

    def _results(self, step: Step) -> list[StepResult]:
        """Waits for the device. Raises what the device raised."""
        if step.turning:
            return self._results_of_turns(step)
        sampled = step.sampled
        if sampled is not None and all(part.num_logprobs < 0 for part in step.parts):
            sampled = sampled[:1]  # nobody reads the scores
        fetched = jax.tree_util.tree_map(np.asarray, (step.flags, sampled, step.prompt_scores))
        count = len(step.parts)
        found = []
        for replica, part in enumerate(step.parts):
            flags = part_of(fetched[0], replica, count, axis=1)  # i32 [3, S]
            own = partial(part_of, replica=replica, replicas=count)
            drawn, scores = jax.tree_util.tree_map(own, fetched[1:])
            found.append(result_of(step.handle.step_id, part, flags, drawn if part.is_drawn else None, scores))
        return found

    def _results_of_turns(self, step: Step) -> list[StepResult]:
        count = len(step.parts)
        asked = any(part.num_logprobs >= 0 for part in step.parts)
        fetched = jax.tree_util.tree_map(np.asarray, step.sampled if asked else step.sampled[:1])
        found = []
        for replica, part in enumerate(step.parts):
            own = partial(part_of, replica=replica, replicas=count)
            sampled, *scores = jax.tree_util.tree_map(own, fetched)
            found.append(result_of_turns(step.handle.step_id, part, sampled, scores, self._config.max_num_steps))
        return found


def result_of(step_id: int, part: Part, flags: I32, sampled: Any, prompt_scores: list[Any]) -> StepResult:
    """One replica's result. flags: i32 [3, S]; sampled: ids and scores of the sampling program, None = not run."""
    count = len(part.sampling_rows)
    ids = flags[0] if sampled is None else sampled[0]
    num_sampled = np.zeros(part.num_rows, np.int32)
    tokens = np.zeros((part.num_rows, 1), np.int32)
    error = np.zeros(part.num_rows, np.uint8)
    num_sampled[part.sampling_rows] = 1
    tokens[part.sampling_rows, 0] = ids[:count]
    error[part.sampling_rows[flags[1, :count] != 0]] = RowError.NON_FINITE
    error[flags[2, : part.num_rows] != 0] = RowError.BAD_TOKEN_ID
    error[part.poisoned] = RowError.BAD_TOKEN_ID
    logprobs = None
    if part.num_logprobs >= 0 and sampled is not None:
        logprobs = scatter(sampled[1], part.sampling_rows, part.num_rows, part.num_logprobs)
    return StepResult(
        step_id=step_id,
        num_sampled=num_sampled,
        tokens=tokens,
        error=error,
        logprobs=logprobs,
        prompt_logprobs=None if part.scored is None else gather(prompt_scores, *part.scored[1:]),
    )


def result_of_turns(step_id: int, part: Part, sampled: I32, scores: list[Any], most: int) -> StepResult:
    """One replica's result of a step of several turns. sampled: i32 [S, k + ENDS]; scores: one entry, or none where
    nobody asked; most: turns of any step, k."""
    turns, count = part.num_steps, part.num_rows
    sampled = sampled[:count]
    num_sampled, broken, bad = sampled[:, most:].T
    error = np.zeros(count, np.uint8)
    error[broken != 0] = RowError.NON_FINITE
    error[bad != 0] = RowError.BAD_TOKEN_ID
    error[part.poisoned] = RowError.BAD_TOKEN_ID
    logprobs = None
    if part.num_logprobs >= 0:
        parts = [whole[:count, :turns] for whole in scores[0]]
        parts = [whole.reshape(count * turns, *whole.shape[2:]) for whole in parts]
        taken = (np.arange(turns) < num_sampled[:, None]).reshape(-1)
        rows = np.flatnonzero(taken).astype(np.int32)
        logprobs = scatter(tuple(whole[rows] for whole in parts), rows, count * turns, part.num_logprobs)
    return StepResult(
        step_id=step_id,
        num_sampled=num_sampled.copy(),
        tokens=sampled[:, :turns].copy(),
        error=error,
        logprobs=logprobs,
    )


def scatter(scores: tuple[Any, ...], rows: I32, num_rows: int, num_top: int) -> Logprobs:
    """Scores of the sampling rows, spread over all rows. scores: f32 [S], i32 [S], i32 [S, k], f32 [S, k]."""
    chosen, rank, ids, top = (np.asarray(part)[: len(rows)] for part in scores)
    result = Logprobs(
        chosen=np.zeros(num_rows, np.float32),
        rank=np.zeros(num_rows, np.int32),
        top_ids=np.full((num_rows, num_top), -1, np.int32),
        top=np.full((num_rows, num_top), -np.inf, np.float32),
    )
    result.chosen[rows], result.rank[rows] = chosen, rank
    result.top_ids[rows], result.top[rows] = ids[:, :num_top], top[:, :num_top]
    return result


def gather(pieces: list[Any], targets: I32, num_top: int) -> Logprobs:
    """Scores of prompt tokens, piece after piece. targets: i32 [M]."""
    count = len(targets)
    parts = [[np.asarray(part) for part in piece] for piece in pieces]
    chosen, rank, ids, top = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return Logprobs(chosen=chosen, rank=rank, top_ids=ids[:, :num_top], top=top[:, :num_top])
