"""The JAX backend against transformers, float32 on the CPU: every dense family, every kind of rope."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import FAMILIES
from tests.models.parity import ROPE_CASES, hold, run_family


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    hold(run_family("jax", family, tmp_path))


@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope(case: str, tmp_path: Path) -> None:
    family, lengths, overrides = ROPE_CASES[case]
    hold(run_family("jax", family, tmp_path, lengths, **overrides), crowded=False)
