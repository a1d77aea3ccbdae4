"""The list of what attention has to do in a step, against a plain count of it."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import DEVICE  # isort: skip, first of all

from cuda_kernels.attention_items import Plan, block_of_rows, class_starts, item_count, make_items, plan_for

SMS = 4


def told(lengths: list[int], kv_heads: int = 2, window: int | None = None, rows: list[int] | None = None):
    """(items with work, their plan, all records); rows: those of a mixed step that have one token."""
    cache = torch.empty(1, 2, 2, kv_heads, 64, 64, device=DEVICE)
    table = torch.zeros(len(lengths) + 1, -(-max(lengths) // 64) + 1, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE) + 7
    numbers = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    places = None
    if rows is not None:
        places = torch.tensor([[row, 10 * row] for row in rows], dtype=torch.int32, device=DEVICE)
    items = make_items(cache, table, slots, numbers, SMS, window=window, rows=places)
    return [record for record in items.records.tolist() if record[5]], items.plan, items.records


@pytest.mark.parametrize("window", [None, 100])
def test_every_key_is_of_one_item(window: int | None) -> None:
    lengths = [1, 64, 65, 700, 3000, 128, 2]
    records, plan, _ = told(lengths, window=window)
    covered: dict[int, list[int]] = {row: [] for row in range(len(lengths))}
    for ticket, token, slot, length, split, splits, share, _ in records:
        assert (token, slot, length) == (ticket, ticket + 7, lengths[ticket])
        first = max(0, length - window) // plan.block if window else 0
        last = -(-(length - 1) // plan.block)  # its own key is no page's yet
        mine = range(first + split * share, min(first + (split + 1) * share, last))
        assert 0 <= split < splits
        covered[ticket] += mine
        assert len(mine) or splits == 1 or split == splits - 1
    for row, length in enumerate(lengths):
        first = max(0, length - window) // plan.block if window else 0
        assert covered[row] == list(range(first, -(-(length - 1) // plan.block)))
    assert [record[0] for record in records] == sorted(record[0] for record in records)
    split = {record[0] for record in records if record[5] > 1}
    assert split == (set() if window else {3, 4})


def test_rows_of_a_mixed_step() -> None:
    """A key of the step itself is in the pages there."""
    records, plan, _ = told([5, 64, 65, 700], rows=[1, 2])
    assert [record[:6] for record in records] == [[0, 10, 8, 64, 0, 1], [1, 20, 9, 65, 0, 1]]
    assert [record[6] for record in records] == [1, 2]
    assert plan.block == 64
    padded, _, every = told([5, 64, 65, 700], rows=[1, 2, -1, -1])
    assert [record[:7] for record in padded] == [record[:7] for record in records]
    assert len(every) > 2


def test_no_more_items_than_the_workspace_holds() -> None:
    lengths = [4000] * 3
    records, plan, every = told(lengths)
    count, budget, _ = item_count(3, 2, 4000 + 64, SMS, plan)
    assert len(every) >= len(records) > 3
    assert len(records) <= 3 + budget
    assert len(every) <= count + 1


def test_plans() -> None:
    few, more, some, many = (plan_for(rows, 8, 256, 132) for rows in (33, 34, 50, 83))
    assert (few.early, few.of_sm, few.lanes) == (True, 2, 16)
    assert some == Plan(merged=4, stages=2, registers=128)
    assert more == many == Plan(block=32, merged=4, warps=2, registers=168)
    assert plan_for(256, 8, 512, 132) == Plan(block=32, merged=4)


@pytest.mark.parametrize("kv_heads", [1, 4, 8, 16])
def test_class_starts_cover_every_number_of_rows(kv_heads: int) -> None:
    """Warm-up runs these: whatever comes later is compiled already."""

    def kind(rows: int) -> tuple[int, Plan]:
        return block_of_rows(rows), plan_for(rows, kv_heads, 256, 132)

    starts = class_starts(1100, kv_heads, 256, 132)
    assert {kind(rows) for rows in starts} == {kind(rows) for rows in range(1, 1101)}
    assert len(starts) == len({kind(rows) for rows in starts}) < 12
    assert starts[0] == 1
