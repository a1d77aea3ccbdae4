"""docs/contract.md, section 9, says what each runner announces: kept true here."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.runner import RUNNERS, Capability, load_runner

CONTRACT = Path(__file__).parents[2] / "docs" / "contract.md"


def announced() -> dict[str, dict[str, str]]:
    """{row: {backend: cell}} of the table in section 9."""
    section = CONTRACT.read_text().split("\n## 9.")[1].split("\n## ")[0]
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    ]
    header = rows[0][1:]
    return {row[0]: dict(zip(header, row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.parametrize("name", RUNNERS)
def test_the_table_is_true(name: str) -> None:
    if name != "fake":
        pytest.importorskip(name, reason=f"{name} is not installed")
    table, info = announced(), load_runner(name).describe()
    said = {
        Capability[capability]
        for row, cells in table.items()
        for capability in row.split(", ")
        if capability in Capability.__members__ and cells[name] == "yes"
    }
    assert said == info.capabilities
    listed = {c for row in table for c in row.split(", ") if c in Capability.__members__}
    assert listed == set(Capability.__members__)
    assert table["max_in_flight"][name] == str(info.max_in_flight)
    assert table["bucket_style"][name] == info.bucket_style
