"""Attention of long steps by FlashInfer: its FlashAttention-3 kernels on sm_90, its FlashAttention-2 ones elsewhere.

An option (`--attention-backend FLASHINFER`) in the place of attention_ragged.py, for steps that no CUDA graph takes.
FlashInfer plans on the host, once a step and kind of layer: captured steps, whose lengths only the device knows, stay
with our kernels. Called by backends/torch/gpu.py and gpu_attention.py; imports flashinfer where it is first used.
Letters: T tokens · S rows · N query heads · K KV heads · H head size · P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORKSPACE_BYTES = 256 << 20  # partial results of rows whose keys are split
PLAN_BYTES = 8 << 20  # of a wrapper: FlashInfer's own


@dataclass(frozen=True, slots=True)
class Kind:
    """What a plan holds for. group: whose pages; the rest as in HeadSpec."""

    group: int
    num_heads: int
    scale: float
    window: int | None
    logit_cap: float | None


class FlashInfer:
    """Of one runner: workspaces and wrappers, so many of each kind that a plan outlives the steps in flight."""

    def __init__(self, device: torch.device, turns: int) -> None:
        self._device, self._turns, self._turn = device, turns, 0
        self._space = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[int, Kind], Any] = {}
        self._copied: list[torch.cuda.Event | None] = [None] * turns

    def begin(self) -> None:
        """A step: wrappers that were planned `turns` steps ago are taken again, once their plans have been copied."""
        self._turn = (self._turn + 1) % self._turns
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()

    def wrapper(self, kind: Kind) -> Any:
        found = self._wrappers.get((self._turn, kind))
        if found is None:
            found = wrapper_class()(self._space, "HND", backend=kernels_of(self._device))
            self._wrappers[self._turn, kind] = found
        return found

    def planned(self) -> None:
        """All plans so far are on their way to the device."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event


def wrapper_class() -> Any:
    from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

    return BatchPrefillWithPagedKVCacheWrapper


def kernels_of(device: torch.device) -> str:
    return "fa3" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else "fa2"


class PagedRows:
    """A step's rows for the layers of one group: what `ragged_attention` is told by tiles."""

    def __init__(
        self, owner: FlashInfer, group: int, num_new: np.ndarray, num_computed: np.ndarray, page_table: Tensor,
        slots: Tensor, to_device: Callable[[np.ndarray], Tensor], page_tokens: int,
    ) -> None:  # fmt: skip
        """num_new, num_computed: [S]; page_table: i32 [max_slots + 1, max_pages]; slots: i64 [S], on the device."""
        keys = np.asarray(num_new, np.int64) + num_computed
        counts = -(-keys // page_tokens)
        ends = np.cumsum(counts)
        row = np.repeat(np.arange(len(counts)), counts)
        places = to_device(np.stack((row, np.arange(len(row)) - (ends - counts)[row])))
        self._owner, self._group, self._page_tokens = owner, group, page_tokens
        self._indices = page_table[slots[places[0]], places[1]]
        self._starts = torch.from_numpy(np.concatenate(([0], np.cumsum(num_new))).astype(np.int32))
        self._page_starts = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
        self._last = torch.from_numpy((keys - (counts - 1) * page_tokens).astype(np.int32))
        self._planned: dict[Kind, Any] = {}

    def attend(
        self, q: Tensor, cache: Tensor, layer: int, *, scale: float, window: int | None, logit_cap: float | None
    ) -> Tensor:
        """Causal attention -> [T, N, H]; this step's keys and values are in the pages already.

        q: [T, N, H]; cache: [L, 2, P, K, page, H]; window: keys that a query sees, itself included.
        """
        _, heads, size = q.shape
        kind = Kind(self._group, heads, scale, window, logit_cap)
        wrapper = self._planned.get(kind)
        if wrapper is None:
            wrapper = self._planned[kind] = self._owner.wrapper(kind)
            wrapper.plan(
                self._starts, self._page_starts, self._indices, self._last, heads, cache.shape[3], size,
                self._page_tokens, causal=True, sm_scale=scale, window_left=-1 if window is None else window - 1,
                logits_soft_cap=logit_cap, q_data_type=q.dtype, kv_data_type=cache.dtype,
            )  # fmt: skip
            self._owner.planned()
        out: Tensor = wrapper.run(q, (cache[layer, 0], cache[layer, 1]))
        return out
