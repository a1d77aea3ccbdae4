"""A step between submit and collect, and what a runner's rooms share of a loaded model. Data alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from backends.torch.batch import Batch, Ends
from backends.torch.results import Outcome
from backends.torch.tables import Tables
from engine.opened import Use
from engine.runner import RunnerConfig
from engine.specs.cache import CacheLayout
from engine.step import I32, StepPlan
from torch_models.decoder import Decoder

if TYPE_CHECKING:
    from backends.torch.xla_batch import Padded
    from cuda_kernels.compile_ahead import Compilers  # needs triton


@dataclass(slots=True, eq=False)
class Step:
    """Equal only to itself: it is its own handle."""

    step_id: int
    plan: StepPlan  # after submit only scalars are read, and copies of what a late forward needs
    sampling_rows: I32
    uses: Use
    poisoned: I32
    # set by `prepare` of the room that runs it
    batch: Batch | None = None
    sampling_slots: Tensor | None = None
    graph_inputs: tuple[int, Tensor, bool] | None = None  # of a decode step that is replayed, see DecodeGraphs.prepare
    mixed_inputs: tuple[int, Tensor] | None = None  # of another step that is replayed, see MixedGraphs.prepare
    padded: Padded | None = None  # of a step through torch-xla
    ends: Ends | None = None  # what the last layer takes, unless it takes every token
    mask: Tensor | None = None
    begun: bool = False
    ended: bool = False
    outcome: Outcome | None = None
    error: RuntimeError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that is ready to take steps."""

    config: RunnerConfig
    decoder: Decoder
    tables: Tables
    layout: CacheLayout
    caches: list[Tensor]  # one a pool
    places: list[tuple[int, int, int]]  # per layer: group, pool, index of the layer within its pool
    compilers: Compilers | None = None  # of a first start on a GPU
