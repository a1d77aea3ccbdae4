"""Steps on a GPU: decode steps and steps of not too many tokens through captured graphs, others without one.

Called by the runner at `submit`. A decode step (every row has one new token and samples) is one copy of a pinned buffer
to the device, a graph for the forward pass, one for greedy sampling or the sampler's own launches, and one copy back.
Any other is a graph in front of the last layer, or the same kernels launched one by one where no graph takes it.
Of a step of many tokens the last layer takes the sampled ones alone, as a decode step, behind all keys and values.
Letters: T tokens · S rows · Z sampled rows, padded to a captured size.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial

import numpy as np
import torch
from torch import Tensor

from backends.torch import gpu_sample
from backends.torch.batch import Batch
from backends.torch.eager import EagerSteps
from backends.torch.graphs import DecodeGraphs
from backends.torch.mixed_graphs import MixedGraphs
from backends.torch.rehearsal import one_layer_of_each_kind
from backends.torch.results import Outcome, Scores
from backends.torch.step import Loaded, Step
from cuda_kernels import compile_jobs, compiles
from cuda_kernels.attention_items import class_starts, row_bytes_of
from cuda_kernels.attention_ragged import RaggedWork, make_work, query_tile
from cuda_kernels.flashinfer_attention import FlashInfer, PagedRows
from cuda_kernels.gpu_attention import GpuWork
from cuda_kernels.small_linear import multiprocessors
from engine.errors import fail
from engine.opened import Use
from engine.runner import Progress
from engine.step import I32, Sampler, StepPlan
from torch_models.decoder import Turns
from torch_models.fused import FusedDecoder, Sampled

WARM_TOKENS = (2, 5, 9, 17, 33, 65, 129, 257, 513, 2049)  # one of each class of sizes that kernels tell apart


class GpuSteps(EagerSteps):
    least_tokens = 129  # the products of fewer take as long as reading their weights

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        compiles.begin()
        self._fused = self.make_decoder(loaded)
        self._graphs = self.make_graphs(loaded)
        self._mixed = self.make_mixed(loaded)
        self._flash = None
        if loaded.config.attention_backend == "FLASHINFER":
            self._flash = FlashInfer(loaded.tables.device, loaded.config.max_in_flight + 1)

    def make_decoder(self, loaded: Loaded) -> FusedDecoder:
        return FusedDecoder(loaded.decoder)

    def make_graphs(self, loaded: Loaded) -> DecodeGraphs:
        return DecodeGraphs(loaded, self._fused)

    def make_mixed(self, loaded: Loaded) -> MixedGraphs | None:
        return MixedGraphs(loaded, self._fused, self._graphs)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Capture steps, then run one other step of each size class: every kernel is compiled here."""
        compilers = self._loaded.compilers
        compile_jobs.prime()
        if compilers is not None:
            told = partial(progress, "compile") if progress is not None else None
            with compile_jobs.rehearsal() as jobs, one_layer_of_each_kind(self._fused, self._loaded.places):
                self._graphs.rehearse()
                if self._mixed is not None:
                    self._mixed.rehearse()
                self._warm_others()
            if progress is not None:
                progress("rehearse", 1, 1)
            compilers.compile(list(jobs.values()), told)
        if self._mixed is not None:
            self._mixed.capture(progress)  # first: they take more of the memory that all graphs share
        self._graphs.capture(progress)
        if self._loaded.tables.device.type != "cuda":
            return  # triton's interpreter compiles nothing
        self._warm_others()
        torch.cuda.synchronize()
        if compilers is not None:
            compilers.leave_note()

    def _warm_others(self) -> None:
        """Steps other than a captured one, of each class of sizes; the samplers."""
        config = self._loaded.config
        most = config.max_batched_tokens
        for tokens in (*(n for n in WARM_TOKENS if n < most), most):
            rows = [config.max_model_len] * (tokens // config.max_model_len)
            rows += [tokens % config.max_model_len] * (tokens % config.max_model_len > 0)
            self._warm(np.array(rows, np.int32))
        for singles in self._classes_of_singles():  # rows of one token beside a longer one
            if singles < config.max_slots and singles + 2 <= most:
                self._warm(np.array([1] * singles + [2], np.int32))
        gpu_sample.warm_up(self._graphs.logits, self._loaded.tables, config.max_slots)

    def _classes_of_singles(self) -> list[int]:
        """Rows of one token of each class that attention tells apart."""
        most, sms = self._loaded.config.max_slots, multiprocessors(self._loaded.tables.device)
        starts = [class_starts(most, cache.shape[3], row_bytes_of(cache), sms) for cache in self._loaded.caches]
        return sorted({rows for found in starts for rows in found})

    def num_compiles(self) -> int:
        return compiles.count()

    def _warm(self, num_new: I32) -> None:
        """A step of rows of the padding slot: what it writes goes to the null page."""
        tables, rows = self._loaded.tables, len(num_new)
        starts = np.cumsum(num_new) - num_new
        index = np.arange(num_new.sum()) - np.repeat(starts, num_new)
        device = [tables.to_device(np.asarray(part, np.int64)) for part in (
            np.zeros(len(index)), index, np.repeat(np.arange(rows), num_new),
            np.full(rows, self._loaded.config.max_slots), starts + num_new - 1,
        )]  # fmt: skip
        ids, positions, token_rows, slots, last = device
        batch = Batch(
            starts=starts.tolist(), num_new=num_new.tolist(), num_computed=[0] * rows, token_ids=ids,
            positions=positions, token_rows=token_rows, index=positions, slots=slots, logit_rows=last,
        )  # fmt: skip
        hidden = self.hidden(batch, ids)
        self.logits(hidden[last])
        if self.least_tokens is not None and len(ids) >= self.least_tokens:
            size = self._graphs.sizes[0]
            ends = np.repeat([[0], [self._loaded.config.max_slots], [1]], size, axis=1)
            self._finish(hidden, *self._turns_and_works(batch), tables.to_device(ends.astype(np.int32)))

    def prepare(self, step: Step) -> None:
        if self._is_decode(step.plan):
            step.graph_inputs = self._graphs.prepare(step.plan)
            return
        step.mixed_inputs = None if self._mixed is None else self._mixed.prepare(step.plan)
        if step.mixed_inputs is None:
            super().prepare(step)

    def padded(self, count: int) -> int:
        """Kernels are compiled for captured sizes."""
        return self._graphs.sizes[bisect_left(self._graphs.sizes, count)] if count else 0

    def _is_decode(self, plan: StepPlan) -> bool:
        rows = plan.num_rows
        if not 0 < rows <= self._graphs.sizes[-1] or plan.num_tokens != rows or len(plan.logit_rows) != rows:
            return False
        few = all(delta is None or len(delta.slots) <= rows for delta in plan.page_deltas)
        return few and plan.prompt_logprobs is None

    def forward(self, step: Step) -> None:
        if self._mixed is not None and step.mixed_inputs is not None:
            self._replay(step, self._mixed, *step.mixed_inputs)
            return
        if step.graph_inputs is None:
            super().forward(step)
            return
        plan = step.plan
        if plan.opened is not None:
            self._loaded.tables.open(plan.opened)
        if plan.copies is not None:
            self.copy_pages(plan)
        self._graphs.forward(*step.graph_inputs)
        step.outcome = Outcome(logits=self._graphs.logits[: plan.num_rows], bad=self._graphs.bad[: plan.num_rows])

    def _replay(self, step: Step, mixed: MixedGraphs, size: int, inputs: Tensor) -> None:
        """A step of any rows through a graph and the last layer of what it samples."""
        plan, count = step.plan, len(step.sampling_rows)
        self.update_tables(plan)
        mixed.forward(size, inputs)
        few = mixed.finish(size, self.padded(count)) if count else mixed.few[:0]
        step.sampling_slots = mixed.slots(size, count)
        bad, broken = mixed.flags[:, : plan.num_rows]
        step.outcome = Outcome(logits=self.logits(few)[:count], bad=bad, broken=broken)

    def sample(self, step: Step) -> None:
        outcome, plan = step.outcome, step.plan
        if step.graph_inputs is None or outcome is None:
            super().sample(step)
            return
        plain = step.uses is Use.NONE or (plan.sampler is Sampler.GREEDY and not plan.late_mask)
        if not plain or plan.num_logprobs >= 0:
            step.sampling_slots = self._graphs.slots(plan.num_rows)
            super().sample(step)
            return
        outcome.send(*self._graphs.end(step.graph_inputs[0]))

    def score(self, logits: Tensor, targets: Tensor, num_top: int) -> Scores:
        return gpu_sample.score(logits, targets, num_top)

    def pick(self, step: Step, logits: Tensor) -> Tensor:
        if step.sampling_slots is None:
            fail(f"step {step.step_id} was not prepared")
        return gpu_sample.pick(logits, step.sampling_slots, step.mask, self._loaded.tables, step.uses)

    # any other step

    def passed(self, step: Step, batch: Batch, ids: Tensor) -> tuple[Tensor, Tensor]:
        if step.ends is None:
            return super().passed(step, batch, ids)
        loaded, (turns, works) = self._loaded, self._turns_and_works(batch)
        hidden = self._fused.run(self._fused.embedded(ids), turns, loaded.caches, loaded.places, works, but_last=True)
        return hidden, self._finish(hidden, turns, works, step.ends.places)[: len(batch.logit_rows)]

    def hidden(self, batch: Batch, ids: Tensor) -> Tensor:
        loaded, (turns, works) = self._loaded, self._turns_and_works(batch)
        return self._fused.run(self._fused.embedded(ids), turns, loaded.caches, loaded.places, works)

    def _turns_and_works(self, batch: Batch) -> tuple[Turns, list[GpuWork]]:
        return self._loaded.decoder.turns(batch.positions), self._works(batch)

    def _finish(self, hidden: Tensor, turns: Turns, works: list[GpuWork], ends: Tensor) -> Tensor:
        """The last layer, [Z, D]. hidden: [T, D] in front of it; ends: i32 [3, Z]."""
        loaded, (tokens, slots, lengths) = self._loaded, ends
        sampled = Sampled(tokens.long(), self._graphs.works_of(slots, lengths))
        return self._fused.finish(hidden, turns, loaded.caches, loaded.places, works, sampled)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._fused.logits(hidden)

    def _works(self, batch: Batch) -> list[GpuWork]:
        tables, layout = self._loaded.tables, self._loaded.layout
        num_new, computed = np.array(batch.num_new, np.int32), np.array(batch.num_computed, np.int32)
        starts = np.array([*batch.starts, len(batch.token_ids)], np.int32)
        numbers = tables.to_device(np.concatenate([starts, num_new + computed]))
        query_starts, lengths = numbers.split([len(starts), len(num_new)])
        slots = batch.slots.int()
        works: list[GpuWork] = []
        if self._flash is not None:
            self._flash.begin()
        for group, pages in zip(layout.groups, tables.pages, strict=True):
            mixer = self._loaded.config.arch.layers[group.spec.layers[0]].mixer
            page = pages[batch.slots[batch.token_rows], batch.index // group.page_tokens]
            tiles: RaggedWork | PagedRows
            if self._flash is not None:
                tiles = PagedRows(
                    self._flash, len(works), num_new, computed, pages, batch.slots, tables.to_device, group.page_tokens
                )
            else:
                tiles = make_work(num_new, computed, query_tile(mixer.num_heads, mixer.num_kv_heads), tables.device)
            works.append(
                GpuWork(
                    page_table=pages,
                    slots=slots,
                    lengths=lengths,
                    workspace=self._graphs.workspace,
                    query_starts=query_starts,
                    write_at=page * group.page_tokens + batch.index % group.page_tokens,
                    tiles=tiles,
                )
            )
        return works
