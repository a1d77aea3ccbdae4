"""KV groups and pools: which layers share a page table, and how many bytes a page of theirs holds.

Built from an ArchSpec by `cache_groups`; `engine/resolve.py` turns it into a CacheLayout with page counts once the
runner has said how much memory there is. The KV manager and every runner read the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.specs.arch import ArchSpec

INT8_PAGES = "int8_per_token_head"
KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, INT8_PAGES: 1}
"""Bytes of a number in a KV page."""
SCALE_BYTES = {INT8_PAGES: 2}
"""Beside each token's keys, and its values, of a head."""


class GroupKind(Enum):
    FULL = "full"
    WINDOW = "window"
    CHUNKED = "chunked"
    LATENT = "latent"
    CROSS = "cross"
    DRAFT = "draft"
    STATE = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """Layers that share one page table."""

    kind: GroupKind
    layers: tuple[int, ...]  # layer indexes, ascending
    num_kv_heads: int  # K
    head_size: int  # H
    window: int | None = None  # tokens a query sees, itself included (kind WINDOW)
    sharded: bool = True  # KV heads are split over tensor-parallel ranks

    def bytes_per_token(self, kv_dtype: str, tensor_parallel: int = 1) -> int:
        """Bytes of K and V of one token in all layers of the group, on one rank (heads replicated when short)."""
        heads = max(1, self.num_kv_heads // tensor_parallel) if self.sharded else self.num_kv_heads
        return 2 * len(self.layers) * heads * (self.head_size * KV_BYTES[kv_dtype] + SCALE_BYTES.get(kv_dtype, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLayout:
    spec: GroupSpec
    pool: int  # index into CacheLayout.pools
    page_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """Memory of one page size. Page 0 is the null page. Groups of one pool have equal (layers, heads, head size)."""

    num_pages: int  # null page included
    page_bytes: int  # on one rank
    num_layers: int
    num_kv_heads: int  # on one rank
    head_size: int
    page_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    groups: tuple[GroupLayout, ...]
    pools: tuple[PoolLayout, ...]
    unit_tokens: int = 16  # tokens that one prefix key covers
    kv_dtype: str = "float32"


def cache_groups(arch: ArchSpec) -> tuple[GroupSpec, ...]:
    """Layers of `arch` that see the same tokens and hold K and V of one shape, in the order of their first layer."""
    members: dict[tuple[int | None, int, int], list[int]] = {}
    for index, layer in enumerate(arch.layers):
        mixer = layer.mixer
        members.setdefault((mixer.window, mixer.num_kv_heads, mixer.head_size), []).append(index)
    return tuple(
        GroupSpec(
            kind=GroupKind.FULL if window is None else GroupKind.WINDOW,
            layers=tuple(layers),
            num_kv_heads=kv_heads,
            head_size=head_size,
            window=window,
        )
        for (window, kv_heads, head_size), layers in members.items()
    )
