"""The PyTorch runner: engine/runner.py's ModelRunner over eager torch.

A step is two jobs, forward and sampling, run in the order of submission: on a GPU `submit` queues them on the stream;
on a CPU `collect` does them in its own thread, so that `submit` returns at once on both. (A worker thread was three
times slower: docs/performance.md.)
Always true: a step that waits for its mask holds up those behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from backends.torch import device as devices
from backends.torch.eager import SCORE_BYTES, EagerSteps
from backends.torch.results import read_result
from backends.torch.step import Loaded, Step
from backends.torch.tables import Tables
from backends.torch.weights import KV_DTYPES, load_params
from backends.torch.xla_tables import PaddedTables
from cuda_kernels.dispatch import cache_shape, has_fused_kernels
from engine.errors import ConfigError, StepFailed, check, fail
from engine.opened import Use, is_poisoned, row_uses
from engine.plan_rules import check_plan
from engine.runner import DeviceInfo, Placement, Progress, RunnerConfig
from engine.specs.cache import CacheLayout
from engine.specs.checkpoint import stream_params
from engine.specs.weights import dummy_blocks
from engine.step import I32, U32, Event, OpenedRows, Sampler, StepPlan, StepResult
from torch_models.decoder import Decoder

if TYPE_CHECKING:
    from cuda_kernels.compile_ahead import Compilers  # needs triton

CLOSED = -1
BROKEN = -2  # a slot of a lost cache: may be closed or opened, not used
CPU_CACHE_BYTES = 8 << 30  # most that the KV pool takes of a host by itself


class Runner:
    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._decoder: Decoder | None = None
        self._tables: Tables | None = None
        self._work: EagerSteps | None = None
        self._compilers: Compilers | None = None
        self._jobs: deque[tuple[Step, Callable[[Step], None]]] = deque()  # on a CPU: begun, not done

    # life

    def describe(self, device: str = "auto") -> DeviceInfo:
        return devices.describe(devices.choose_device(device))

    def configure(self, config: RunnerConfig, place: Placement) -> None:
        for name, value, only in (
            ("num_replicas", config.num_replicas, 1),
            ("process_count", place.process_count, 1),
            ("tensor_size", place.tensor_size, 1),
        ):
            if value != only:
                raise ConfigError(f"{name}: {value} is not supported by the torch backend yet; expected {only}")
        if config.attention_backend == "FLASHINFER":
            devices.check_flashinfer()
        self._config = config
        self._device = devices.choose_device(config.device)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if self._device.type == "cpu":
            devices.keep_freed_memory()
        elif has_fused_kernels(self._device):
            from cuda_kernels import compile_ahead  # needs triton

            self._compilers = compile_ahead.begin(f"{config} {torch.cuda.get_device_name(self._device)}")
        self._generation = np.full(config.max_slots, CLOSED, np.int64)
        self._uses = np.zeros(config.max_slots, np.int32)
        self._poisoned = np.zeros(config.max_slots, np.bool_)

    def load(self, checkpoint: Path | None, progress: Progress | None = None) -> None:
        config = self._config
        if config.load_format == "dummy":
            stream = dummy_blocks(config.arch, config.seed)
        elif config.load_format == "orbax":
            raise ConfigError("--load-format: orbax is not supported by the torch backend; use safetensors")
        else:
            check(checkpoint is not None, "load needs a checkpoint unless the weights are dummies")
            stream = stream_params(Path(str(checkpoint)), config.arch, progress)
        params = load_params(config.arch, stream, config.dtype, self._device)
        self._decoder = Decoder(config.arch, params, config.max_model_len).eval()

    def memory_plan(self, config: RunnerConfig) -> dict[str, int]:
        device = devices.choose_device(config.device)
        if device.type != "cuda" or not has_fused_kernels(device):
            return {}
        from backends.torch import memory  # needs triton

        return memory.plan(config, torch.cuda.get_device_properties(device).multi_processor_count)

    def memory_peak(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_reserved(self._device)

    def cache_budget_bytes(self) -> int:
        free = devices.memory(self._device)[1]
        planned = self.memory_plan(self._config)
        if planned:
            free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return max(0, free - sum(planned.values()) + planned["weights"])
        free -= self._workspace_bytes()
        if devices.is_host(self._device):
            free = min(free // devices.HOST_SHARE, CPU_CACHE_BYTES)
        return max(0, free)

    def _workspace_bytes(self) -> int:
        """Activations and logits of the largest step, with room for the sampler's float32 copies and tables."""
        config, arch = self._config, self._config.arch
        tokens = config.max_batched_tokens
        widest = max(2 * layer.ffn.size + arch.hidden_size for layer in arch.layers)
        activations = tokens * widest * 4 * 3
        sampling = min(config.max_slots, tokens) * arch.vocab_size * 4 * 12
        tables = config.max_slots * arch.vocab_size * 9
        gathered = 2 * config.max_model_len * 4 * max(x.mixer.num_heads * x.mixer.head_size for x in arch.layers) * 4
        return activations + sampling + tables + gathered + SCORE_BYTES * 3

    def allocate_cache(self, layout: CacheLayout) -> None:
        config = self._config
        if self._decoder is None:
            fail("load comes before allocate_cache")
        fused = has_fused_kernels(self._device)
        through_xla = self._device.type == "xla"
        caches = [
            torch.zeros(
                cache_shape(
                    pool.num_layers, pool.num_pages, pool.page_tokens, pool.num_kv_heads, pool.head_size, fused
                ),
                dtype=KV_DTYPES[config.kv_dtype],
                device=self._device,
            )
            for pool in ([] if through_xla else layout.pools)  # XlaSteps makes its own
        ]
        found = {
            layer: (index, group.pool, nth)
            for index, group in enumerate(layout.groups)
            for nth, layer in enumerate(group.spec.layers)
        }
        max_pages = [-(-config.max_model_len // group.page_tokens) for group in layout.groups]
        make = PaddedTables if through_xla else Tables
        self._tables = make(config.max_slots, max_pages, config.arch.vocab_size, config.sampler_limits, self._device)
        loaded = Loaded(
            config=config,
            decoder=self._decoder,
            tables=self._tables,
            layout=layout,
            caches=caches,
            places=[found[layer] for layer in range(len(found))],
            compilers=self._compilers,
        )
        self._work = self._room(loaded, fused)

    def _room(self, loaded: Loaded, fused: bool) -> EagerSteps:
        if self._device.type == "xla":
            from backends.torch.xla_steps import XlaSteps  # needs torch-xla and jax

            return XlaSteps(loaded, devices.xla_platform())
        if not fused:
            return EagerSteps(loaded)
        if self._config.batch_invariant:
            from backends.torch.invariant import InvariantSteps  # needs triton

            return InvariantSteps(loaded)
        from backends.torch.gpu import GpuSteps  # needs triton

        return GpuSteps(loaded)

    def warm_up(self, progress: Progress | None = None) -> None:
        work = self._ready()[0]
        with torch.inference_mode():
            work.warm_up(progress)
        self._end_compilers()

    def num_compiles(self) -> int:
        return 0 if self._work is None else self._work.num_compiles()

    def _end_compilers(self) -> None:
        compilers, self._compilers = self._compilers, None
        if compilers is not None:
            compilers.close()

    def shutdown(self) -> None:
        self._end_compilers()
        self._jobs.clear()
        self._steps.clear()
        self._decoder, self._tables, self._work = None, None, None

    def _ready(self) -> tuple[EagerSteps, Tables]:
        if self._work is None or self._tables is None:
            fail("load and allocate_cache come first")
        return self._work, self._tables

    # steps

    def submit(self, plans: Sequence[StepPlan]) -> Step:
        work = self._ready()[0]
        check(len(self._steps) < self._config.max_in_flight, f"{len(self._steps)} steps are in flight already")
        check(len(plans) == 1, f"{len(plans)} plans for 1 replica")
        plan = plans[0]
        check_plan(plan, self._config)
        self._check_tenancies(plan)
        rows = np.flatnonzero(plan.num_logits).astype(np.int32)
        slots = plan.slots[rows]
        uses = Use.NONE
        if plan.sampler is Sampler.FULL or plan.late_mask:
            uses = Use(int(np.bitwise_or.reduce(self._uses[slots], initial=0)))
        if self._device.type == "cpu" or not all(step.ended for step in self._steps):
            plan = private(plan)  # its forward runs after submit has returned
        step = Step(
            step_id=plan.step_id,
            plan=plan,
            sampling_rows=rows,
            uses=uses,
            poisoned=self._poisoned_rows(plan),
        )
        work.prepare(step)
        self._steps.append(step)
        self._advance()
        return step

    def provide_mask(self, handle: Any, rows: I32, bits: U32) -> None:
        step = self._find(handle)
        plan, vocab = step.plan, self._config.arch.vocab_size
        check(plan.late_mask, f"step {step.step_id} was not submitted with a late mask")
        check(step.mask is None, f"step {step.step_id} has its mask already")
        words = -(-vocab // 32)
        check(bits.shape == (len(rows), words), f"mask bits {bits.shape} for {len(rows)} rows of {words} words")
        check(not len(rows) or (rows.min() >= 0 and rows.max() < plan.num_rows), f"mask rows {rows.tolist()}")
        allowed = np.ones((plan.num_rows, vocab), np.bool_)
        unpacked = np.unpackbits(np.ascontiguousarray(bits.astype("<u4")).view(np.uint8), axis=1, bitorder="little")
        allowed[rows] = unpacked[:, :vocab].astype(np.bool_)
        self._ready()[0].take_mask(step, allowed[step.sampling_rows])
        step.uses |= Use.MASK if len(rows) else Use.NONE
        self._advance()

    def collect(self, handle: Any) -> Sequence[StepResult]:
        step = self._find(handle)
        check(step is self._steps[0], f"step {step.step_id} is collected before {self._steps[0].step_id}")
        check(step.ended, f"step {step.step_id} waits for its mask")
        try:
            while self._jobs and self._jobs[0][0] is step:
                do(*self._jobs.popleft())
            if step.error is not None:
                raise step.error
            if step.outcome is None:
                fail(f"step {step.step_id} has no outcome")
            result = read_result(step.plan, step.sampling_rows, step.poisoned, step.outcome)
        except RuntimeError as error:  # torch's own, out of memory among them; the cache is still there
            raise self._failure(error) from error
        finally:
            self._steps.pop(0)
        return (result,)

    def _failure(self, error: RuntimeError) -> StepFailed:
        lost = self._ready()[0].lose()
        if lost:
            self._generation[self._generation != CLOSED] = BROKEN
        text = str(error).splitlines()[0][:200] if str(error) else ""
        return StepFailed(f"{type(error).__name__}: {text}", cache_lost=lost)

    def poll(self) -> list[Event]:
        return []

    def _find(self, handle: Any) -> Step:
        for step in self._steps:
            if step is handle:
                return step
        fail(f"step {getattr(handle, 'step_id', handle)} is not in flight")

    def _check_tenancies(self, plan: StepPlan) -> None:
        """Keeps the host's mirror of the slots."""
        if plan.closed is not None:
            is_open = self._generation[plan.closed] != CLOSED
            check(is_open.all(), f"step {plan.step_id} closes slots {plan.closed[~is_open].tolist()}: not open")
            self._generation[plan.closed] = CLOSED
        if plan.opened is not None:
            opened: OpenedRows = plan.opened
            self._generation[opened.slots] = opened.generation
            for i, slot in enumerate(opened.slots.tolist()):
                self._uses[slot] = row_uses(opened.sampling, i)
                self._poisoned[slot] = is_poisoned(opened.sampling, i, self._config.arch.vocab_size)
        same = self._generation[plan.slots] == plan.generation
        check(same.all(), f"step {plan.step_id} uses slots {plan.slots[~same].tolist()} of another generation")

    def _poisoned_rows(self, plan: StepPlan) -> I32:
        """Rows whose tables or prompt-logprob targets hold ids outside the vocabulary."""
        poisoned = self._poisoned[plan.slots]
        scored = plan.prompt_logprobs
        if scored is not None:
            outside = (scored.targets < 0) | (scored.targets >= self._config.arch.vocab_size)
            rows = np.searchsorted(np.cumsum(plan.num_new), scored.token_idx[outside], side="right")
            poisoned[rows] = True
        return np.flatnonzero(poisoned).astype(np.int32)

    def _advance(self) -> None:
        """Start everything that may start, in order."""
        work = self._ready()[0]
        for step in self._steps:
            if not step.begun:
                step.begun = True
                self._run(step, work.forward)
            if step.plan.late_mask and step.mask is None:
                return
            if not step.ended:
                step.ended = True
                self._run(step, work.sample)

    def _run(self, step: Step, job: Callable[[Step], None]) -> None:
        if self._device.type == "cpu":
            self._jobs.append((step, job))  # collect does it
        else:
            do(step, job)


def do(step: Step, job: Callable[[Step], None]) -> None:
    """Run a job; a step whose forward failed fails as a whole."""
    if step.error is not None:
        return
    try:
        with torch.inference_mode():
            job(step)
    except RuntimeError as error:
        step.error = error


def private(plan: StepPlan) -> StepPlan:
    """The plan with copies of the arrays that the jobs read later."""

    def copied(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, tuple):
            return tuple(copied(part) for part in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: copied(getattr(value, f.name)) for f in fields(value)})
        return value

    kept = {name: copied(getattr(plan, name)) for name in ("opened", "page_deltas", "copies", "prompt_logprobs")}
    return replace(plan, **kept)
