"""Steps on a GPU for --batch-invariant: a row's tokens and logprobs depend on nothing but its own sequence.

The rooms of gpu.py and graphs.py over torch_models/invariant.py. Whatever is computed of a token has one way to be
computed: decode and prefill share every kernel, angles come from the same operations, and kernels that read logits take
a program a row. Called by the runner. Letters: T tokens · S rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backends.torch.batch import Batch
from backends.torch.gpu import GpuSteps
from backends.torch.graphs import DecodeGraphs
from backends.torch.step import Loaded
from cuda_kernels.invariant_attention import Scratch, Tiles, make_scratch, make_tiles, query_tile
from cuda_kernels.step_begin import DecodeStart
from torch_models.decoder import Turns
from torch_models.invariant import InvariantDecoder, InvariantWork


def heads_of(loaded: Loaded) -> list[set[tuple[int, int]]]:
    """(N, K) of the layers of each group."""
    layers = loaded.config.arch.layers
    mixers = [[layers[index].mixer for index in group.spec.layers] for group in loaded.layout.groups]
    return [{(mixer.num_heads, mixer.num_kv_heads) for mixer in group} for group in mixers]


class InvariantGraphs(DecodeGraphs):
    """Decode steps as graphs. A step's attention finds its rows in tables that never change: row r has query r."""

    def __init__(self, loaded: Loaded, fused: InvariantDecoder) -> None:
        super().__init__(loaded, fused)
        device, largest = loaded.tables.device, self.sizes[-1]
        self._rows = torch.arange(largest + 1, dtype=torch.int32, device=device)
        singles = torch.stack((self._rows[:-1], torch.zeros_like(self._rows[:-1])), 1).contiguous()
        self._tiles = [Tiles(many=singles[:0], singles=singles[:size]) for size in range(largest + 1)]

    def rehearse(self) -> None:
        """Nothing: torch would look up places at positions that no kernel wrote. Other steps have the same kernels."""

    def make_workspace(self, rows: int) -> Scratch:
        loaded = self._loaded
        sizes = [
            make_scratch(
                rows, mixer.num_heads, mixer.num_kv_heads, mixer.head_size,
                loaded.tables.pages[nth].shape[1] * group.page_tokens, loaded.tables.device,
            )
            for nth, group in enumerate(loaded.layout.groups)
            for mixer in {loaded.config.arch.layers[index].mixer for index in group.spec.layers}
        ]  # fmt: skip
        return max(sizes, key=lambda scratch: (len(scratch.partials), len(scratch.counters)))

    def make_one_launch(self) -> None:
        """One launch has other orders of sums than a prefill."""

    def turns(self, begun: DecodeStart) -> Turns:
        return self._loaded.decoder.turns(begun.positions)

    def works(self, begun: DecodeStart, slots: Tensor) -> list[InvariantWork]:  # type: ignore[override]
        loaded, size = self._loaded, len(slots)
        works = []
        for group, pages, kinds in zip(loaded.layout.groups, loaded.tables.pages, heads_of(loaded), strict=True):
            # a rehearsal leaves positions unwritten: they must not lead outside the table
            column = (begun.positions // group.page_tokens).clamp(0, pages.shape[1] - 1)
            page = pages[slots, column]
            works.append(
                InvariantWork(
                    page_table=pages,
                    slots=slots,
                    lengths=begun.lengths,
                    query_starts=self._rows[: size + 1],
                    write_at=page * group.page_tokens + begun.positions % group.page_tokens,
                    tiles={heads // kv_heads: self._tiles[size] for heads, kv_heads in kinds},
                    scratch=self.workspace,
                )
            )
        return works


class InvariantSteps(GpuSteps):
    least_tokens = None  # the decode kernels of the last layer would add up otherwise

    def make_graphs(self, loaded: Loaded) -> DecodeGraphs:
        return InvariantGraphs(loaded, self._fused)

    def make_mixed(self, loaded: Loaded) -> None:
        """Steps of many tokens stay as they are: the decode kernels of the last layer would add up otherwise."""

    def make_decoder(self, loaded: Loaded) -> InvariantDecoder:
        return InvariantDecoder(loaded.decoder)

    def _works(self, batch: Batch) -> list[InvariantWork]:  # type: ignore[override]
        tables, layout = self._loaded.tables, self._loaded.layout
        num_new, computed = np.array(batch.num_new, np.int32), np.array(batch.num_computed, np.int32)
        starts = np.array([*batch.starts, len(batch.token_ids)], np.int32)
        numbers = tables.to_device(np.concatenate([starts, num_new + computed]))
        query_starts, lengths = numbers.split([len(starts), len(num_new)])
        slots = batch.slots.int()
        works = []
        for group, pages, kinds in zip(layout.groups, tables.pages, heads_of(self._loaded), strict=True):
            page = pages[batch.slots[batch.token_rows], batch.index // group.page_tokens]
            works.append(
                InvariantWork(
                    page_table=pages,
                    slots=slots,
                    lengths=lengths,
                    query_starts=query_starts,
                    write_at=page * group.page_tokens + batch.index % group.page_tokens,
                    tiles={
                        heads // kv_heads: make_tiles(num_new, computed, query_tile(heads, kv_heads), tables.device)
                        for heads, kv_heads in kinds
                    },
                    scratch=self._graphs.workspace,
                )
            )
        return works
