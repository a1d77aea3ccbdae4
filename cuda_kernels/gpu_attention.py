"""Attention of a GPU step: from the fused qkv product to the outputs of the heads.

Query-key norm, rope, cache write and attention, called by torch_models/fused.py. A step in which every row has one
token takes one launch (`decode_attention`), any other step two (`rope_and_write`, `ragged_attention`). Needs triton.
Pages of e4m3 hold keys and values as they are, saturated at 448: the scales that the kernels take stay 1 here.
Letters: T tokens · S rows · N query heads · K KV heads · H head size · R rotary size · L layers of a pool · P pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cuda_kernels.attention_decode import decode_attention
from cuda_kernels.attention_items import Items
from cuda_kernels.attention_ragged import ragged_attention
from cuda_kernels.flashinfer_attention import PagedRows
from cuda_kernels.fused import can_overlap
from cuda_kernels.rope_cache import rope_and_write


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuWork:
    """What attention must do in this step for the layers of one group. Everything step-dependent is on the device."""

    page_table: Tensor  # i32 [max_slots + 1, max_pages]; the last row is that of padding, all null pages
    slots: Tensor  # i32 [S]
    lengths: Tensor  # i32 [S] keys that a row sees, this step's own included
    workspace: Any  # of decode_attention
    items: Items | None = None  # of steps in which every row has one token
    # of steps with rows of more than one token; None where every row has one
    query_starts: Tensor | None = None  # i32 [S + 1]
    write_at: Tensor | None = None  # [T] page * page_tokens + offset of each token
    tiles: Any = None  # of ragged_attention, or PagedRows in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """What a layer's attention is like, in plain values."""

    num_heads: int
    scale: float
    window: int | None = None
    logit_cap: float | None = None
    q_norm: Tensor | None = None  # f32 [H]
    k_norm: Tensor | None = None  # f32 [H]
    norm_eps: float = 1e-6
    norm_offset: float = 0.0


def attend(
    qkv: Tensor, turn: tuple[Tensor | None, Tensor | None], cache: Tensor, layer: int, work: GpuWork, spec: HeadSpec
) -> Tensor:
    """Write this step's keys and values into the pages, then attend. -> [T, N * H].

    qkv: [T, (N + 2K) * H]; turn: cos and sin, f32 [T, R / 2], None without rope; cache: [L, 2, P, K, page, H], changed
    in place.
    """
    cos, sin = turn
    norms = {
        "q_norm": spec.q_norm,
        "k_norm": spec.k_norm,
        "norm_eps": spec.norm_eps,
        "norm_offset": spec.norm_offset,
    }
    limits = {"scale": spec.scale, "logit_cap": spec.logit_cap}
    if work.items is not None:
        return decode_attention(
            qkv, cache, layer, work.page_table, work.items, cos, sin,
            num_heads=spec.num_heads, workspace=work.workspace, **limits, **norms,
            # Table and items are read before the launch in front is done: at layer 0 that may be what writes them.
            dependent=layer > 0 and can_overlap(qkv.device),
        )  # fmt: skip
    q = rope_and_write(qkv, cache, layer, work.write_at, cos, sin, num_heads=spec.num_heads, **norms)
    if isinstance(work.tiles, PagedRows):
        return work.tiles.attend(q, cache, layer, window=spec.window, **limits).reshape(len(q), -1)
    out = ragged_attention(
        q,
        cache,
        layer,
        work.page_table,
        work.slots,
        work.query_starts,
        work.lengths,
        work=work.tiles,
        window=spec.window,
        **limits,
    )
    return out.view(out.shape[0], -1)
