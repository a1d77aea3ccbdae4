"""Steps with prompt tokens as captured CUDA graphs, one a size: all in front of the sampled tokens' last layer.

Called by backends/torch/gpu.py. Tokens are padded to the next captured size with tokens of a padding row, whose pages
are all the null page; tiles and rows of one token come as lists of fixed length, whose entries of row -1 do nothing.
What a step is told comes by one copy. Sizes share the memory of the decode graphs. Off a GPU (triton's interpreter, in
tests) the bodies run as they are.
Always true: what a graph leaves is read before the next step's graph is launched, on the same stream.
Letters: T tokens of a size · S = T + 1 rows, the last one padding · Z sampled rows · W tiles · B rows of one token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends.torch.batch import Batch, known_ids, newest_rows, rows_with
from backends.torch.graphs import DecodeGraphs
from backends.torch.mixed_inputs import MixedInputs, mixed_sizes, q_tile_of
from backends.torch.rehearsal import one_layer_of_each_kind
from backends.torch.step import Loaded
from cuda_kernels.attention_ragged import RaggedWork
from cuda_kernels.gpu_attention import GpuWork
from engine.runner import Progress
from engine.step import StepPlan
from torch_models.fused import FusedDecoder


class MixedGraphs:
    """What the step launched last left.

    few: [Z, D] the sampled tokens in front of the last layer, which `finish` does;
    flags: bool [2, S] rows with an id outside the vocabulary, rows with a hidden state that is not finite.
    """

    def __init__(self, loaded: Loaded, fused: FusedDecoder, decode: DecodeGraphs) -> None:
        config, device = loaded.config, loaded.tables.device
        self._loaded, self._fused, self._decode = loaded, fused, decode
        self.sizes = mixed_sizes(config.max_batched_tokens)
        self._inputs_of = {size: MixedInputs(config, size, self._sampled(size)) for size in self.sizes}
        longest, largest = max(inputs.length for inputs in self._inputs_of.values()), self.sizes[-1]
        self._inputs = torch.zeros(longest, dtype=torch.int32, device=device)
        ring, pinned = range(config.max_in_flight + 1), device.type == "cuda"
        self._sent = [torch.zeros(longest, dtype=torch.int32, pin_memory=pinned) for _ in ring]
        self._turn = 0
        self._graphs: dict[int, Callable[[], None]] = {}
        sampled, rope = decode.sizes[-1], config.arch.layers[-1].mixer.rope
        half = 0 if rope is None else rope.rotary_size // 2
        self.flags = torch.zeros(2, largest + 1, dtype=torch.bool, device=device)
        self.few = torch.zeros(sampled, config.arch.hidden_size, dtype=fused.embed.dtype, device=device)
        self._turns = torch.zeros(2, sampled, half, device=device) if half else None

    def _sampled(self, size: int) -> int:
        """Z of a step that samples at every token."""
        sizes = self._decode.sizes
        return sizes[bisect_left(sizes, min(size, sizes[-1]))]

    def rehearse(self) -> None:
        """The launches of all sizes, uncaptured: for whoever lists what they compile."""
        for size in reversed(self.sizes):
            self._warm(size)

    def capture(self, progress: Progress | None = None) -> None:
        for done, size in enumerate(reversed(self.sizes)):
            if self._inputs.is_cuda:
                with one_layer_of_each_kind(self._fused, self._loaded.places):
                    self._warm(size)  # kernels are compiled here, and libraries take their workspaces
            self._graphs[size] = self._decode.captured(partial(self._forward, size))
            if progress is not None:
                progress("capture prompts", done + 1, len(self.sizes))

    def _warm(self, size: int) -> None:
        """A step of padding alone, of every layer: which kind stands last depends on how many layers are left."""
        inputs = self._inputs_of[size]
        inputs.blank(self._sent[self._turn])
        self._inputs[: inputs.length].copy_(self._sent[self._turn][: inputs.length])
        self._forward(size, but_last=False)

    # a step

    def prepare(self, plan: StepPlan) -> tuple[int, Tensor] | None:
        """(size, pinned inputs), None for a step that no graph takes. Everything is copied out of the plan."""
        if not 0 < plan.num_tokens <= self.sizes[-1] or plan.prompt_logprobs is not None or plan.drafts is not None:
            return None
        size = self.sizes[bisect_left(self.sizes, plan.num_tokens)]
        sampled, inputs = newest_rows(plan), self._inputs_of[size]
        if size not in self._graphs or sampled is None or not inputs.fits(plan, sampled):
            return None
        self._turn = (self._turn + 1) % len(self._sent)
        inputs.fill(self._sent[self._turn], plan, sampled)
        return size, self._sent[self._turn][: inputs.length]

    def forward(self, size: int, inputs: Tensor) -> None:
        self._inputs[: len(inputs)].copy_(inputs, non_blocking=True)
        self._graphs[size]()

    def finish(self, size: int, count: int) -> Tensor:
        """The last layer of the step launched last, [Z, D]. count: Z, a captured size."""
        loaded, (_, slots, lengths) = self._loaded, self._inputs_of[size].parts(self._inputs)["ends"]
        works = self._decode.works_of(slots[:count], lengths[:count])
        cos, sin = (None, None) if self._turns is None else self._turns[:, :count]
        return self._fused.behind(self.few[:count], (cos, sin), loaded.caches, loaded.places, works)

    def slots(self, size: int, count: int) -> Tensor:
        """i64 [count] slots of the rows that the step launched last samples."""
        return self._inputs_of[size].parts(self._inputs)["ends"][1, :count].long()

    # body of the graphs

    def _forward(self, size: int, but_last: bool = True) -> None:
        loaded, fused, parts = self._loaded, self._fused, self._inputs_of[size].parts(self._inputs)
        batch = self._batch(parts, size)
        ids, bad = known_ids(batch, loaded.tables, fused.spec.vocab_size)
        turns, works = loaded.decoder.turns(batch.positions), self._works(parts, batch)
        where = (loaded.caches, loaded.places, works)
        x = fused.run(fused.embedded(ids), turns, *where, but_last=but_last)
        fused.write_last(x, turns, *where)
        broken = rows_with(batch, ~x.sum(dim=1, dtype=torch.float32).isfinite())
        self.flags[0, : size + 1], self.flags[1, : size + 1] = bad, broken
        count = len(batch.logit_rows)
        torch.index_select(x, 0, batch.logit_rows, out=self.few[:count])
        if self._turns is not None:
            for turn, into in zip(turns[fused.layers[-1][0].spec.mixer.rope], self._turns, strict=True):
                into[:count] = turn[batch.logit_rows]

    def _batch(self, parts: dict[str, Tensor], size: int) -> Batch:
        """What known_ids and rows_with read of one."""
        token_ids, rows, index = parts["tokens"].long()
        none: list[int] = [0] * (size + 1)
        return Batch(
            starts=none, num_new=none, num_computed=none, token_ids=token_ids, positions=index, token_rows=rows,
            index=index, slots=parts["rows"][0].long(), logit_rows=parts["ends"][0].long(),
        )  # fmt: skip

    def _works(self, parts: dict[str, Tensor], batch: Batch) -> list[GpuWork]:
        loaded, scratch = self._loaded, self._decode.workspace
        mixers = {layer.mixer for layer in loaded.config.arch.layers}
        works = []
        for group, pages in zip(loaded.layout.groups, loaded.tables.pages, strict=True):
            q_tile = q_tile_of(loaded.config.arch, group.spec)
            page = pages[batch.slots[batch.token_rows], batch.index // group.page_tokens]
            workspaces: dict[tuple[int, int], Any] = {(mixer.num_heads, mixer.head_size): scratch for mixer in mixers}
            works.append(
                GpuWork(
                    page_table=pages,
                    slots=parts["rows"][0],
                    lengths=parts["rows"][1],
                    workspace=scratch,
                    query_starts=parts["starts"][0],
                    write_at=page * group.page_tokens + batch.index % group.page_tokens,
                    tiles=RaggedWork(
                        q_tile=q_tile,
                        tiles=parts[f"tiles {q_tile}"],
                        singles=parts["singles"],
                        workspaces=workspaces,
                    ),
                )
            )
        return works
