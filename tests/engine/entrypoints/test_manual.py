"""docs/api.md names every route, every field and every error code; docs/cli.md every variable."""

from __future__ import annotations

import re
from pathlib import Path

from engine import env
from engine.entrypoints.fields import CHAT, COMPLETION
from engine.metrics.export import EngineMetrics
from tests.engine.entrypoints.conftest import App

DOCS = Path(__file__).parents[3] / "docs"


def test_routes_and_fields(app: App) -> None:
    manual = (DOCS / "api.md").read_text()
    for path in app.app.openapi()["paths"]:
        assert re.sub(r"\{.*\}", "{id}", path) in manual, path
    for name in {**CHAT, **COMPLETION}:
        assert f"`{name}`" in manual, name


def test_metrics() -> None:
    manual = (DOCS / "api.md").read_text()
    for family in EngineMetrics("m", max_model_len=10, cache={}).collect():
        assert f"`{family.name.removeprefix('twinfer:')}`" in manual, family.name


def test_variables() -> None:
    manual = (DOCS / "cli.md").read_text()
    for variable in env.VARIABLES:
        assert f"`{variable.name}`" in manual, variable.name
