"""jax == transformers through the whole engine, for every family and rope. The harness is tested beside torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.numerics import CASES, Case, check_report, run_case


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_equals_transformers(case: Case, tmp_path: Path) -> None:
    check_report(run_case("jax", case, tmp_path))
