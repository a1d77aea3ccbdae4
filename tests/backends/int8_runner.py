"""A jax runner that keeps KV pages in int8, whatever it was asked for: so that tests of other pages ask it too."""

from __future__ import annotations

from dataclasses import replace

from backends.jax.runner import Runner
from engine.runner import Placement, RunnerConfig
from engine.specs.cache import INT8_PAGES, CacheLayout


class Int8Runner(Runner):
    def configure(self, config: RunnerConfig, place: Placement) -> None:
        super().configure(replace(config, kv_dtype=INT8_PAGES), place)

    def allocate_cache(self, layout: CacheLayout) -> None:
        super().allocate_cache(replace(layout, kv_dtype=INT8_PAGES))
