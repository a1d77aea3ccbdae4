"""What a captured step with prompt tokens is told, as one array of i32: where each part lies, and what stands in it.

Used by mixed_graphs.py, by memory.py for its size. Whatever the step does not fill says nothing: tokens of a padding
row of the padding slot, tiles and rows of one token that are -1.
Letters: T tokens of a size · S = T + 1 rows, the last one padding · Z sampled rows.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cuda_kernels.attention_ragged import query_tile
from cuda_kernels.attention_tiles import query_tiles
from engine.runner import RunnerConfig
from engine.specs.arch import ArchSpec
from engine.specs.cache import GroupSpec, cache_groups
from engine.step import I32, StepPlan, query_starts

SIZES = (16, 32, 64, *range(128, 512, 64), *range(512, 1025, 128))  # beyond, a GPU is slower than its host anyway
MOST_SINGLES = 256  # rows of one token in a step
PARTIAL_TILES = 32  # tiles of a step beyond those that its tokens fill


def mixed_sizes(max_tokens: int) -> list[int]:
    """Tokens of the captured steps, ascending, up to max_tokens."""
    return sorted({min(size, max_tokens) for size in SIZES})


def q_tile_of(arch: ArchSpec, group: GroupSpec) -> int:
    """Query tokens of a tile."""
    mixer = arch.layers[group.layers[0]].mixer
    return query_tile(mixer.num_heads, mixer.num_kv_heads)


class MixedInputs:
    """Of one size. length: of the array; sampled: Z."""

    def __init__(self, config: RunnerConfig, size: int, sampled: int) -> None:
        self._padding, self._size, self._sampled = config.max_slots, size, sampled
        self._q_tiles = sorted({q_tile_of(config.arch, group) for group in cache_groups(config.arch)})
        several = min(config.max_slots, size // 2)  # rows that have more than one token
        shapes = {
            "tokens": (3, size),  # id, row, index in its sequence
            "rows": (2, size + 1),  # slot, keys that it sees
            "starts": (1, size + 2),  # of a row's tokens, and one past the last
            "ends": (3, sampled),  # token, slot, keys that it sees
            "singles": (min(config.max_slots, size, MOST_SINGLES), 2),
        }
        for q_tile in self._q_tiles:
            shapes[f"tiles {q_tile}"] = (-(-size // q_tile) + min(PARTIAL_TILES, several), 2)
        self._shapes, self._places, self.length = shapes, {}, 0
        for name, (lines, columns) in shapes.items():
            self._places[name] = slice(self.length, self.length + lines * columns)
            self.length += -(-lines * columns // 4) * 4  # each part from a multiple of 16 bytes on

    def parts(self, inputs: Tensor) -> dict[str, Tensor]:
        """Views of them, see `shapes`. inputs: i32 [>= length]."""
        return {name: inputs[self._places[name]].view(shape) for name, shape in self._shapes.items()}

    def blank(self, inputs: Tensor) -> dict[str, I32]:
        """A step of padding alone, and its parts to be written. inputs: i32 [>= length], on the host."""
        inputs[: self.length] = 0
        parts = {name: part.numpy() for name, part in self.parts(inputs).items()}
        parts["tokens"][1] = self._size  # the padding row
        for name in ("rows", "ends"):
            parts[name][-2], parts[name][-1] = self._padding, 1
        for name, part in parts.items():
            if name.startswith(("singles", "tiles")):
                part[:, 0] = -1
        return parts

    def fits(self, plan: StepPlan, sampled: I32) -> bool:
        """sampled: the rows that are."""
        if plan.num_tokens > self._size or len(sampled) > self._sampled:
            return False
        if np.count_nonzero(plan.num_new == 1) > self._shapes["singles"][0]:
            return False
        several = plan.num_new[plan.num_new > 1]
        return all((-(-several // q_tile)).sum() <= self._shapes[f"tiles {q_tile}"][0] for q_tile in self._q_tiles)

    def fill(self, inputs: Tensor, plan: StepPlan, sampled: I32) -> None:
        """A step that fits."""
        parts, rows, tokens, starts = self.blank(inputs), plan.num_rows, plan.num_tokens, query_starts(plan)
        lengths = plan.num_computed + plan.num_new
        parts["starts"][0], parts["starts"][0, :rows] = tokens, starts[:-1]
        parts["rows"][0, :rows], parts["rows"][1, :rows] = plan.slots, lengths
        row = np.repeat(np.arange(rows, dtype=np.int32), plan.num_new)
        index = np.arange(tokens, dtype=np.int32) + (plan.num_computed - starts[:-1])[row]
        for line, values in zip(parts["tokens"], (plan.token_ids, row, index), strict=True):
            line[:tokens] = values
        for line, values in zip(parts["ends"], (plan.logit_rows, plan.slots[sampled], lengths[sampled]), strict=True):
            line[: len(sampled)] = values
        for q_tile in self._q_tiles:
            tiles, singles = query_tiles(plan.num_new, plan.num_computed, q_tile)
            parts[f"tiles {q_tile}"][: len(tiles)] = tiles
            parts["singles"][: len(singles)] = np.stack((singles, starts[singles]), 1)
