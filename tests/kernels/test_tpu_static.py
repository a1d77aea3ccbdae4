"""What the TPU compiler makes of the kernels, held to the table of record: nothing spills, loops do not grow."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from bench import tpu_static
from bench.tpu_chip import GENERATIONS

RECORD = json.loads(tpu_static.TABLE.read_text())["table"]


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_kernel_grows(generation: str) -> None:
    found = tpu_static.measure(generation)
    for name, figures in found.items():
        recorded = RECORD[generation][name]
        grown = {key: (figures[key], recorded[key]) for key in figures if figures[key] > recorded[key] and key in HELD}
        assert not grown, f"{generation} {name}: {grown}; python -m bench.tpu_static --write if that is meant"


HELD = ("bundles", "loop", "fills", "spills", "vmem")


def test_the_record_keeps_what_was_promised() -> None:
    """Decode: no spill, at most 530 bundles a page on v6e; window, cap, sinks, 8 bits add at most a tenth anywhere."""
    for generation, kernels in RECORD.items():
        assert set(kernels) == {*tpu_static.SHAPES, *tpu_static.OTHERS}, generation
        assert not any(figures["spills"] for name, figures in kernels.items() if name.startswith("decode")), generation
        for form in ("window", "capped", "sinks", "fp8", "int8"):
            assert kernels[f"decode_{form}"]["loop"] <= 1.1 * kernels["decode"]["loop"], (generation, form)
    assert RECORD["v6e"]["decode"]["loop"] <= 530
