"""The sampler's fused launches on a GPU, by the tables of a runner. Same tokens as backends/torch/sample.py.

Called by backends/torch/gpu.py. Processors (mask, allowed ids, bad words, min_tokens, biases, penalties) stay those of
sample.py; temperature, filters, noise and choice are the kernels'. Letters: L sampling rows · V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.torch import sample as plain
from backends.torch.results import Scores
from backends.torch.tables import Tables
from cuda_kernels import sampler, sampling
from cuda_kernels import score as scoring
from engine.opened import Use

PIECE_BYTES = 64 << 20  # of logits that processors copy at a time: what memory.py counts on
DRAWN = Use.RANDOM | Use.MIN_P | Use.TOP_K | Use.TOP_P | Use.LOGPROBS  # the kernels', without a copy


def pick(logits: Tensor, slots: Tensor, mask: Tensor | None, tables: Tables, uses: Use) -> Tensor:
    """Token ids i64 [L]. logits: f32 [L, V]; slots: i64 [L]; mask: bool [L, V]."""
    rows = max(1, PIECE_BYTES // (4 * logits.shape[1]))
    if len(logits) <= rows or not uses & ~DRAWN:
        return pick_piece(logits, slots, mask, tables, uses)
    masks = [None] * len(logits) if mask is None else mask.split(rows)
    pieces = zip(logits.split(rows), slots.split(rows), masks, strict=False)
    return torch.cat([pick_piece(*piece, tables, uses) for piece in pieces])


def pick_piece(logits: Tensor, slots: Tensor, mask: Tensor | None, tables: Tables, uses: Use) -> Tensor:
    """The same of few rows."""
    x = plain.processed(logits, slots, mask, tables, uses)
    return draw(x, slots, tables) if Use.RANDOM in uses else sampling.argmax(x)


def draw(x: Tensor, slots: Tensor, tables: Tables) -> Tensor:
    """Token ids i64 [L] by temperature, filters and seed. x: f32 [L, V] behind the processors; slots: i64 [L]."""
    columns = (tables.temperature, tables.min_p, tables.top_k, tables.top_p, tables.seed, tables.num_outputs)
    return sampler.sample(x, slots, *columns)[0]


def score(logits: Tensor, targets: Tensor, num_top: int) -> Scores:
    """Raw log-probabilities. logits: f32 [L, V]; targets: i64 [L]."""
    fits = num_top <= min(scoring.MOST_TOP, logits.shape[1])
    return (scoring if fits else plain).score(logits, targets, num_top)


def warm_up(logits: Tensor, tables: Tables, slot: int) -> None:
    """Compile every kernel for one row and for several. logits: f32 [2 or more, V]; slot: the padding's."""
    for rows in range(1, min(2, len(logits)) + 1):
        slots = torch.full((rows,), slot, device=tables.device)
        for num_top in (0, 1, 2):
            score(logits[:rows], draw(logits[:rows], slots, tables), num_top)
        sampling.argmax(logits[:rows])
