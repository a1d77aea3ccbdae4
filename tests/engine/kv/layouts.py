"""Small cache layouts for the tests of engine/kv."""

from __future__ import annotations

from engine.specs.cache import CacheLayout, GroupKind, GroupLayout, GroupSpec, PoolLayout


def small_layout(
    windows: tuple[int | None, ...], pools: tuple[int, ...], num_pages: int, page_tokens: int, unit_tokens: int
) -> CacheLayout:
    """One group a window (None = full), each in the pool named beside it; every pool has `num_pages` pages."""
    groups = tuple(
        GroupLayout(
            spec=GroupSpec(
                kind=GroupKind.FULL if window is None else GroupKind.WINDOW,
                layers=(i,),
                num_kv_heads=1,
                head_size=8,
                window=window,
            ),
            pool=pool,
            page_tokens=page_tokens,
        )
        for i, (window, pool) in enumerate(zip(windows, pools, strict=True))
    )
    one = PoolLayout(
        num_pages=num_pages, page_bytes=64, num_layers=1, num_kv_heads=1, head_size=8, page_tokens=page_tokens
    )
    return CacheLayout(groups=groups, pools=(one,) * (max(pools) + 1), unit_tokens=unit_tokens)
