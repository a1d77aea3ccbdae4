"""The one meeting place of engine and backends: the ModelRunner protocol. docs/contract.md tells its rules in prose.

The executor drives a runner with `submit(plans) -> handle`, `collect(handle) -> results`: `submit` returns at once, so
that step n + 1 is planned while step n runs and sampled tokens stay on the device. Steps are collected in the order in
which they were submitted; at most `RunnerConfig.max_in_flight` are open. backends/fake.py checks every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Protocol

from engine.errors import ConfigError
from engine.specs.arch import ArchSpec
from engine.specs.cache import CacheLayout
from engine.specs.executables import Compiled
from engine.specs.manifest import Part
from engine.specs.quant import FORMS
from engine.specs.weights import ParamSpec, RawTensor
from engine.step import I32, U32, Event, StepPlan, StepResult


class Capability(Enum):
    """What a runner can do beyond plain steps. Ask this, never hasattr."""

    LATE_MASK = "late_mask"
    MULTI_STEP = "multi_step"  # num_steps > 1
    DRAFTS = "drafts"
    DRAFT_TREE = "draft_tree"
    STATE = "state"
    CROSS = "cross"
    TRANSFERS = "transfers"
    PROMPT_LOGPROBS = "prompt_logprobs"
    REPLICAS = "replicas"  # more than one plan a submit
    POOLING = "pooling"
    BATCH_INVARIANT = "batch_invariant"  # RunnerConfig.batch_invariant
    EXECUTABLES = "executables"  # RunnerConfig.executables


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What a runner found: asked before anything is configured."""

    kind: str  # "cpu" | "gpu" | "tpu" | "fake"
    name: str
    num_devices: int = 1
    memory_bytes: int  # of one device, total
    free_bytes: int  # of one device, now
    capabilities: frozenset[Capability]
    max_in_flight: int = 2
    page_tokens: int = 64  # the page size that this device's attention likes; a multiple of the unit
    default_dtype: str = "float32"  # what --dtype auto means where the checkpoint says bfloat16 or float16
    supported_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    kv_dtypes: tuple[str, ...] = ()  # of KV pages, besides supported_dtypes
    attention_backends: tuple[str, ...] = ()  # values of --attention-backend, besides auto
    quantization: tuple[str, ...] = ()  # values of --quantization whose checkpoints can be loaded
    weight_forms: tuple[str, ...] = FORMS  # of weights in few bits, see specs/quant.py
    bucket_style: str = "pow2"  # "pow2": few, coarse shapes (compiled); "exact": any shape, no padding


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerLimits:
    """Static sizes of the device sampling tables; the bounds table of engine/params.py keeps requests inside."""

    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_stop_ids: int = 128
    max_bad_words: int = 128  # token sequences a row
    max_bad_word_len: int = 16  # tokens a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where this runner process stands among its peers."""

    process_index: int = 0
    process_count: int = 1
    coordinator: str | None = None
    tensor_rank: int = 0
    tensor_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Everything a runner must know before weights are loaded."""

    arch: ArchSpec
    dtype: str  # of weights and activations
    kv_dtype: str
    max_slots: int  # rows of the persistent device tables; slots are [0, max_slots)
    max_model_len: int
    page_tokens: tuple[int, ...]  # per group, in the order of specs.cache groups
    token_buckets: tuple[int, ...]  # T, ascending; empty where any shape runs
    row_buckets: tuple[int, ...]  # S, ascending
    max_batched_tokens: int = 2048  # most tokens of a step, buckets or not
    num_replicas: int = 1
    tensor_size: int = 1  # devices of this process that share every layer
    max_in_flight: int = 2
    max_num_steps: int = 1  # most decode turns of a step, see StepPlan.num_steps
    max_turn_rows: int = 1 << 20  # most rows of a step of several turns
    sampler_limits: SamplerLimits = field(default_factory=SamplerLimits)
    load_format: str = "auto"  # "auto" | "safetensors" | "orbax" | "dummy"
    seed: int = 0  # of dummy weights
    device: str = "auto"
    attention_backend: str = "auto"  # or one of DeviceInfo.attention_backends
    batch_invariant: bool = False  # what a row gives depends on nothing but its own sequence, bit by bit
    num_threads: int = 0  # host threads a CPU backend may use, 0 = all
    executables: str = ""  # folder of `twinfer compile` to load programs from, "" = compile


class StepHandle(Protocol):
    """What submit returns: opaque to the engine, hashable."""

    @property
    def step_id(self) -> int: ...


ON_DEMAND = "on_demand"
"""The part of a memory plan that is allocated when requests ask for it: tables of biases, a sampler's copies."""

Progress = Callable[[str, int, int], None]
"""(phase, done, total): "weights" in bytes, the others in programs. Called from the runner's own thread."""


class ModelRunner(Protocol):
    """Executes StepPlans. Calls come in this order: describe, configure, load, allocate_cache, warm_up, then steps."""

    def describe(self, device: str = "auto") -> DeviceInfo:
        """device: --device. The one asked for is described, and configured later. Raises ConfigError."""

    def configure(self, config: RunnerConfig, place: Placement) -> None: ...

    def load(self, checkpoint: Path | None, progress: Progress | None = None) -> None:
        """Read the weights (None with load_format "dummy"). Raises CheckpointError."""

    def memory_plan(self, config: RunnerConfig) -> dict[str, int]:
        """Bytes by purpose that an engine of this configuration takes of one device, the KV cache left out.

        Worked out, nothing is allocated; ON_DEMAND is for what comes on demand. {} where
        the backend does not plan. Asked after describe, of configurations that may never be used.
        """

    def memory_peak(self) -> int:
        """Most bytes that the backend's allocator held at once, KV pages included; 0 where nobody counts."""

    def cache_budget_bytes(self) -> int:
        """Device memory left for KV after weights and the largest step's workspace. Asked after load."""

    def allocate_cache(self, layout: CacheLayout) -> None: ...

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile (or capture) every program of the configured buckets. No compile may happen after this."""

    def num_compiles(self) -> int:
        """Programs compiled so far, without those loaded from a bundle; must not grow after warm_up."""

    def submit(self, plans: Sequence[StepPlan]) -> StepHandle:
        """Start one step (one plan per data replica, same step_id and bucket) and return at once.

        The plans' arrays are read, and never written by anybody, until the step is collected. A part of a plan whose
        Capability was not announced, or a plan that breaks the contract, raises InternalError; the plan was not taken.
        StepFailed here means the same as from collect, for this plan alone.
        """

    def provide_mask(self, handle: StepHandle, rows: I32, bits: U32) -> None:
        """Release the sampling of a step submitted with late_mask. Called once a step, with n = 0 when no row needs it.

        rows: i32 [n] row indexes (over all plans of the step, one after another); rows not named sample freely.
        bits: u32 [n, ceil(V / 32)], bit v % 32 of word v // 32 set = id v is allowed.
        """

    def collect(self, handle: StepHandle) -> Sequence[StepResult]:
        """Wait for the oldest step; token ids are on the host afterwards. Raises StepFailed.

        After a failure every step still in flight is collected before the next submit; what they answer is dropped.
        """

    def poll(self) -> list[Event]:
        """Transfers that ended while no step ran."""

    def shutdown(self) -> None: ...


RUNNERS = {
    "fake": "backends.fake",
    "jax": "backends.jax.runner",
    "torch": "backends.torch.runner",
}


def load_runner(name: str) -> ModelRunner:
    """The runner of a backend. The only dynamic import of the engine besides installed entry points."""
    if name not in RUNNERS:
        raise ConfigError(f"--backend: {name!r} is not known; one of {', '.join(RUNNERS)} or auto")
    module = import_module(RUNNERS[name])
    runner: ModelRunner = module.Runner()
    return runner


class CheckpointWriter(Protocol):
    """A backend's writer of its own checkpoint format, for `twinfer convert`."""

    def write(self, target: Path, params: Iterator[tuple[ParamSpec, RawTensor]]) -> list[Part]:
        """Write every parameter under `target`, in bounded memory."""


Measure = Callable[[list[str]], list[tuple[int, int]]]
"""Names of programs -> (scratch, code) bytes of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A bundle that was written."""

    num_programs: int
    num_bytes: int
    key: dict[str, str]  # field -> what the programs were built for


class ExecutableBuilder(Protocol):
    """What `twinfer compile` drives, in this order: a runner's shapes and programs without weights or steps."""

    def describe(self, device: str, tpu: str | None) -> DeviceInfo:
        """device: --device; tpu: --tpu, a device that is not here. Raises ConfigError."""

    def configure(self, config: RunnerConfig) -> None: ...

    def key(self) -> dict[str, str]:
        """What the programs depend on, field -> text."""

    def sizes(self, name: str) -> tuple[int, int]:
        """(scratch, code) bytes of a program, compiled for few pages."""

    def cache_budget_bytes(self, measure: Measure | None = None) -> int:
        """As ModelRunner's, with the weights counted as if they were loaded. measure: `sizes` elsewhere."""

    def compile(self, layout: CacheLayout, name: str) -> Compiled: ...

    def build(
        self,
        layout: CacheLayout,
        folder: Path,
        progress: Progress,
        elsewhere: Callable[[list[str]], Iterable[Compiled]] | None = None,
    ) -> Built:
        """Compile every program and write the new folder. progress: "programs". elsewhere: `compile` of all names."""


BUILDERS = {"jax": "backends.jax.build"}
WRITERS = {"orbax": "backends.jax.orbax"}


def load_builder(name: str) -> ExecutableBuilder:
    """The builder of a backend's executables; a dynamic import as load_runner's."""
    builder: ExecutableBuilder = import_module(BUILDERS[name]).Builder()
    return builder


def load_writer(name: str) -> CheckpointWriter:
    """The writer of a checkpoint format; the dynamic import beside load_runner's."""
    try:
        writer: CheckpointWriter = import_module(WRITERS[name])
    except ImportError as error:
        raise ConfigError(f"twinfer convert: {error}; install it with pip install 'twinfer[orbax]'") from error
    return writer
