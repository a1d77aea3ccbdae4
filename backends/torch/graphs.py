"""Decode steps of a GPU as captured CUDA graphs: one for the forward pass, one for greedy sampling, for each size.

Called by backends/torch/gpu.py. Rows are padded to the next captured size with rows of the padding slot, whose pages
are all the null page. Every graph reads the same static buffers; sizes are captured from the largest down, so that they
share one memory pool. Off a GPU (triton's interpreter, in tests) the bodies run as they are.
Always true: what a graph reads is written on the same stream, in the order of submission.
Letters: S rows · G groups · V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends.torch.rehearsal import one_layer_of_each_kind
from backends.torch.step import Loaded
from cuda_kernels import attention_decode
from cuda_kernels.attention_items import make_items
from cuda_kernels.gpu_attention import GpuWork
from cuda_kernels.persistent import PersistentDecode
from cuda_kernels.sampling import end_decode, scan
from cuda_kernels.step_begin import DecodeStart, begin_decode
from engine.errors import fail
from engine.runner import Progress
from engine.step import StepPlan
from torch_models.decoder import Turns
from torch_models.fused import FusedDecoder, capped
from torch_models.persistent import MOST_KEYS, persistent_decode

SLOTS, COMPUTED, TOKENS, DELTAS = 0, 1, 2, 3  # rows of the input buffer; from DELTAS on three a group


def capture_sizes(max_rows: int) -> list[int]:
    """Rows of the captured decode steps, ascending, up to max_rows."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 32), *range(576, max_rows + 64, 64)]
    return sorted({min(size, max_rows) for size in sizes})


def captured(run: Callable[[], None], stream: torch.cuda.Stream, pool: tuple[int, int] | None) -> torch.cuda.CUDAGraph:
    """The launches of `run` as a graph. pool: shared memory, None: a new one.

    torch.cuda.graph would give all cached memory back before every capture, 96 times for 48 sizes.
    """
    torch.cuda.synchronize()
    if pool is None:
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin() if pool is None else graph.capture_begin(pool)
        run()
        graph.capture_end()
    return graph


class DecodeGraphs:
    """logits f32 [largest, V] holds the rows of the step that was launched last."""

    def __init__(self, loaded: Loaded, fused: FusedDecoder) -> None:
        config, device = loaded.config, loaded.tables.device
        self._loaded = loaded
        self._fused = fused
        self.sizes = capture_sizes(min(config.max_slots, config.max_batched_tokens))
        self._padding = config.max_slots
        self._lines = DELTAS + 3 * len(loaded.layout.groups)
        largest, pinned = self.sizes[-1], device.type == "cuda"
        self._inputs = torch.zeros(self._lines * largest, dtype=torch.int32, device=device)
        self._packed = torch.zeros(3 * largest, dtype=torch.int32, device=device)
        ring = range(config.max_in_flight + 1)
        self._sent = [torch.zeros(len(self._inputs), dtype=torch.int32, pin_memory=pinned) for _ in ring]
        self._answers = [torch.zeros(len(self._packed), dtype=torch.int32, pin_memory=pinned) for _ in ring]
        self._turn = self._answer = 0
        self.logits = torch.empty(largest, config.arch.vocab_size, dtype=torch.float32, device=device)
        self.bad = torch.zeros(largest, dtype=torch.int32, device=device)  # 1: the row's id was outside the vocabulary
        self.workspace = self.make_workspace(largest)
        self._one_launch = self.make_one_launch()
        self._forwards: dict[int, Callable[[], None]] = {}
        self._stream = torch.cuda.Stream() if self._inputs.is_cuda else None
        self._pool: tuple[int, int] | None = None
        self._shorts: dict[int, Callable[[], None]] = {}  # of few rows and keys, if one launch does all
        self._endings: dict[int, Callable[[], None]] = {}

    # what a room with other kernels does in its own way

    def make_workspace(self, rows: int) -> Any:
        """Scratch of the attention of steps of up to `rows` rows."""
        mixers = [layer.mixer for layer in self._loaded.config.arch.layers]
        heads, size = max(mixer.num_heads for mixer in mixers), max(mixer.head_size for mixer in mixers)
        return attention_decode.make_workspace(rows, heads, size, self._loaded.tables.device)

    def make_one_launch(self) -> PersistentDecode | None:
        """The kernel of a whole step, for models that are small enough."""
        return persistent_decode(self._fused, self._loaded.caches, self._loaded.places)

    def turns(self, begun: DecodeStart) -> Turns:
        """cos and sin of each kind of rope."""
        return {None: (None, None), **dict(zip(self._fused.frequencies, begun.turns, strict=True))}

    def works(self, begun: DecodeStart, slots: Tensor) -> list[GpuWork]:
        """The attention work of each group. slots: i32 [S]."""
        return self.works_of(slots, begun.lengths)

    def works_of(self, slots: Tensor, lengths: Tensor) -> list[GpuWork]:
        """The attention work of rows of one token, of each group. slots, lengths: i32 [S]."""
        loaded, works = self._loaded, []
        for group, pages in zip(loaded.layout.groups, loaded.tables.pages, strict=True):
            items = make_items(
                loaded.caches[group.pool], pages, slots, lengths, self.workspace.num_sms, window=group.spec.window
            )
            works.append(GpuWork(page_table=pages, slots=slots, lengths=lengths, workspace=self.workspace, items=items))
        return works

    def rehearse(self) -> None:
        """The launches of all sizes, uncaptured: for whoever lists what they compile."""
        for size in reversed(self.sizes):
            self._inputs[: self._lines * size].copy_(self._fill(size, None))
            self._forward(size)
            self._end(size)

    def capture(self, progress: Progress | None = None) -> None:
        for done, size in enumerate(reversed(self.sizes)):
            bodies = [(self._forwards, partial(self._forward, size)), (self._endings, partial(self._end, size))]
            if self._one_launch is not None and size <= self._one_launch.most_rows:
                bodies.append((self._shorts, partial(self._short, size)))
            if self._stream is not None:
                self._inputs[: self._lines * size].copy_(self._fill(size, None))
                with one_layer_of_each_kind(self._fused, self._loaded.places):
                    for _, run in bodies:
                        run()  # kernels are compiled here, and libraries take their workspaces
            for graphs, run in bodies:
                graphs[size] = self.captured(run)
            if progress is not None:
                progress("capture", done + 1, len(self.sizes))

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """The launches of `run` as a graph, in the memory that all graphs share; off a GPU `run` itself."""
        if self._stream is None:
            return run
        graph = captured(run, self._stream, self._pool)
        self._pool = graph.pool()
        return graph.replay

    # a step

    def prepare(self, plan: StepPlan) -> tuple[int, Tensor, bool]:
        """(size, pinned inputs, whether one launch does the step). Everything is copied out of the plan."""
        size = self.sizes[bisect_left(self.sizes, plan.num_rows)]
        self._turn = (self._turn + 1) % len(self._sent)
        short = size in self._shorts and int(plan.num_computed.sum()) <= MOST_KEYS
        return size, self._fill(size, plan), short

    def forward(self, size: int, inputs: Tensor, short: bool) -> None:
        self._inputs[: len(inputs)].copy_(inputs, non_blocking=True)
        (self._shorts if short else self._forwards)[size]()

    def end(self, size: int) -> tuple[Tensor, tuple[int, int, int]]:
        """Greedy sampling of the step launched last. -> (i32 [3 * S] on its way to the host, where its parts begin)."""
        self._endings[size]()
        self._answer = (self._answer + 1) % len(self._answers)
        answer = self._answers[self._answer][: 3 * size]
        answer.copy_(self._packed[: 3 * size], non_blocking=True)
        return answer, (0, size, 2 * size)

    def slots(self, rows: int) -> Tensor:
        """i64 [rows] slots of the step launched last."""
        return self._inputs[:rows].long()

    def _fill(self, size: int, plan: StepPlan | None) -> Tensor:
        buffer = self._sent[self._turn][: self._lines * size]
        lines = buffer.view(self._lines, size).numpy()
        rows = 0 if plan is None else plan.num_rows
        lines[:, rows:] = 0
        lines[SLOTS, rows:] = self._padding
        if plan is not None:
            lines[SLOTS, :rows], lines[COMPUTED, :rows], lines[TOKENS, :rows] = (
                plan.slots,
                plan.num_computed,
                plan.token_ids,
            )
        for group in range((self._lines - DELTAS) // 3):
            at = DELTAS + 3 * group
            delta = plan.page_deltas[group] if plan is not None and plan.page_deltas else None
            count = 0 if delta is None else len(delta.slots)
            if delta is not None:
                lines[at, :count], lines[at + 1, :count], lines[at + 2, :count] = (
                    delta.slots,
                    delta.columns,
                    delta.pages,
                )
            lines[at, count:] = self._padding
            lines[at + 1 : at + 3, count:] = 0
        return buffer

    # bodies of the graphs

    def _forward(self, size: int) -> None:
        begun, slots = self._begin(size)
        works = self.works(begun, slots)
        x = self._fused.run(begun.x, self.turns(begun), self._loaded.caches, self._loaded.places, works)
        self._fused.logits(x, out=self.logits[:size])

    def _short(self, size: int) -> None:
        """The same in one launch behind the first."""
        if self._one_launch is None:
            fail("no kernel does a step of this model in one launch")
        (begun, slots), spec, logits = self._begin(size), self._fused.spec, self.logits[:size]
        turn = self.turns(begun)[spec.layers[0].mixer.rope]
        self._one_launch.run(begun.x, turn, self._loaded.tables.pages[0], slots, begun.lengths, logits)
        capped(logits, spec)

    def _begin(self, size: int) -> tuple[DecodeStart, Tensor]:
        """What the step begins with, and its slots, i32 [S]."""
        tables, spec = self._loaded.tables, self._fused.spec
        lines = self._inputs[: self._lines * size].view(self._lines, size)
        deltas = [
            (*lines[DELTAS + 3 * group : DELTAS + 3 * group + 3], pages) for group, pages in enumerate(tables.pages)
        ]
        begun = begin_decode(
            lines[SLOTS],
            lines[TOKENS],
            lines[COMPUTED],
            tables.last_token,
            tables.last_token,  # stands for lengths that the host left open: it leaves none
            list(self._fused.frequencies.values()),
            self._fused.embed,
            spec.embedding_scale,
            deltas,
            self.bad[:size],
        )
        return begun, lines[SLOTS]

    def _end(self, size: int) -> None:
        tables = self._loaded.tables
        found = scan(self.logits[:size])
        end_decode(found, self._inputs[:size], tables.last_token, tables.num_outputs, self._packed, self.bad[:size])
