"""jax == transformers through the whole engine, for every family and rope. The harness is tested beside torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.numerics import RUNS, Case, Sizes, check_report, run_case


@pytest.mark.parametrize(("case", "sizes"), RUNS)
def test_equals_transformers(case: Case, sizes: Sizes, tmp_path: Path) -> None:
    check_report(run_case("jax", case, tmp_path, sizes))
