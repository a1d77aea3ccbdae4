"""Slices as --tpu and --gpu spell them, and what the table of chips must hold to be used."""

from __future__ import annotations

from typing import Literal

import pytest

from engine.errors import ConfigError
from engine.specs.chips import CHIPS, chips_of, parse_slice

Kind = Literal["tpu", "gpu"]


@pytest.mark.parametrize(
    ("kind", "text", "chips", "devices"),
    [
        ("tpu", "v6e:2x4", 8, 8),
        ("tpu", "v6e", 1, 1),
        ("tpu", "V5E:2x2", 4, 4),
        ("tpu", "v5p:2x2x1", 4, 4),
        ("tpu", "v5p", 4, 4),  # no slice of fewer can be had
        ("tpu", "tpu7x", 1, 2),
        ("tpu", "tpu7x:2x2x1", 4, 8),
        ("gpu", "h200", 1, 1),
        ("gpu", "h200:4", 4, 4),
    ],
)
def test_slices(kind: Kind, text: str, chips: int, devices: int) -> None:
    found = parse_slice(kind, text)
    assert (found.num_chips, found.num_devices) == (chips, devices)
    assert parse_slice(kind, found.text) == found


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("tpu", "v6f", "--tpu: 'v6f' is not known; one of v5e, v6e, v5p, tpu7x; did you mean 'v6e'?"),
        ("tpu", "v6e-8", "did you mean 'v6e:2x4'?"),
        ("tpu", "v5litepod-16", "did you mean 'v5e:4x4'?"),
        ("tpu", "v5p-8", "did you mean 'v5p:2x2x1'?"),
        ("tpu", "abacus", "one of v5e, v6e, v5p, tpu7x"),
        ("tpu", "v6e:2x3", "'2x3' is not a topology of v6e; one of 1x1, 2x2, .*did you mean 'v6e:2x2'?"),
        ("tpu", "v6e:8", "did you mean 'v6e:2x4'?"),
        ("tpu", "v6e:", "'' is not a topology of v6e"),
        ("tpu", "v5p:2x4", "did you mean 'v5p:2x2x2'?"),
        ("tpu", "h200:4", "--tpu: 'h200:4' is not a TPU; did you mean --gpu h200:4?"),
        ("gpu", "v6e", "did you mean --tpu v6e?"),
        ("gpu", "h20", "--gpu: 'h20' is not known; .*did you mean 'h200'?"),
        ("gpu", "h200:3", "'3' is not a number of h200; one of 1, 2, 4, 8; did you mean 'h200:2'?"),
        ("gpu", "a100", "did you mean 'a100-80g'?"),
    ],
)
def test_what_there_is_not(kind: Kind, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")) as caught:
        parse_slice(kind, text)
    assert "\n" not in str(caught.value)


def test_the_table_is_whole() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert any("http" in source for source in chip.sources), chip.name
        sizes = [chips_of(topology) for topology in chip.topologies]
        assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes), chip.name
        assert {"bfloat16"} <= set(chip.flops) <= {"bfloat16", "fp8", "int8"}
        assert all(chip.flops[kind] >= chip.flops["bfloat16"] for kind in chip.flops)
        assert 1e10 < chip.memory_bytes < 2e11 and 1e11 < chip.bandwidth < 1e13  # bytes, bytes a second
