"""The short form of A9: the long one is `python bench/scheduler.py --soak 1000000`."""

from __future__ import annotations

import pytest

from bench.soak import soak


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_by_the_thousand(seed: int) -> None:
    count = soak(6000, seed=seed, check_every=15)
    assert count.finished + count.aborted + count.failed == count.added == 6000
    assert count.preemptions > 10 and count.hit_tokens > 10_000 and count.aborted > 10
    assert count.heap_growth_blocks < 5000
