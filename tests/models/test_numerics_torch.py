"""torch == transformers through the whole engine, for every family and rope; and the harness can tell when not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.models.numerics import BOUND, FAMILY_CASES, RUNS, Case, Sizes, check_report, run_case


@pytest.mark.parametrize(("case", "sizes"), RUNS)
def test_equals_transformers(case: Case, sizes: Sizes, tmp_path: Path) -> None:
    check_report(run_case("torch", case, tmp_path, sizes))


def test_a_wrong_window_shows(tmp_path: Path) -> None:
    """One token more of window in the reference is found in log-probabilities and in tokens."""
    case = next(case for case in FAMILY_CASES if case.name == "mistral")
    other = write_checkpoint("mistral", tmp_path / "other", sliding_window=25)
    report = run_case("torch", case, tmp_path / "served", Sizes(prompts=2, again=0), reference=other)
    assert report.difference > 100 * BOUND and report.wrong
