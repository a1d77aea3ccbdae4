"""A step over several chips, compiled by libtpu without them, moves what it must between them and no more."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from bench.collectives import Collective, collectives
from bench.split import ROWS, SLICES, SPLIT_TOKENS, TOKENS, in_process, least, totals

CASES = [SLICES[0], *(pytest.param(*s, marks=pytest.mark.slow) for s in SLICES[1:])]
TABLE_BYTES = 1 << 18
"""Most that one collective of the sampler moves: a vocabulary's worth of 64 rows is 39 MB."""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("slice_name", "ranks", "replicas"), CASES)
def test_collectives_are_the_least(slice_name: str, ranks: int, replicas: int) -> None:
    found = in_process(slice_name, ranks, replicas)
    for tokens in (ROWS, TOKENS):
        assert totals(found[f"forward-{tokens}"]) == least(tokens, ranks)
        kinds = {"all-reduce"} if tokens < SPLIT_TOKENS else {"all-reduce", "reduce-scatter", "all-gather"}
        assert {one["kind"] for one in found[f"forward-{tokens}"]} == (kinds if ranks > 1 else set())
    sampler = found[f"sample-{ROWS}"]
    assert bool(sampler) == (ranks > 1)
    assert all(one["num_bytes"] <= TABLE_BYTES for one in sampler)


def test_loops_pairs_and_branches_are_counted() -> None:
    text = """
%body (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} all-reduce(%x), to_apply=%add
}

%inner (p: f32[8]) -> f32[8] {
  %b = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), dimensions={0}
  %c = bf16[16]{0} all-gather-done(%b)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%p), condition=%less, body=%body
  %v = f32[8]{0} while(%w), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %d = (f32[2]{0}, s32[2]{0}) all-reduce(%y, %z), to_apply=%add
}
"""
    assert sorted(collectives(text, 5), key=lambda one: one.times) == [
        Collective("all-reduce", ("f32[2]", "s32[2]"), 16, 1),
        Collective("all-gather", ("bf16[16]",), 32, 3),
        Collective("all-reduce", ("f32[8]",), 32, 5),
    ]
