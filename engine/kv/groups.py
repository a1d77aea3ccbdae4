"""PageTable: the pages of every row in one group, as numpy tables, and what a prefix hit means for the group's kind.

    column      0        first_column            num_columns
    entries     null ... page ... page           null ...
    tokens      [freed behind the window)[held)[not allocated)

Column c of a row holds tokens [c * page_tokens, (c + 1) * page_tokens). A FULL group keeps first_column at 0. A WINDOW
group gives pages back once no later query can see them. The manager is the only caller; it takes pages from the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import ConfigError, check
from engine.kv.page_pool import PagePool
from engine.kv.prefix_cache import UnitIndex
from engine.specs.cache import GroupKind, GroupLayout
from engine.step import I32, I64, NULL_PAGE


@dataclass(frozen=True, slots=True)
class GroupHit:
    """Pages of one group that a hit reads: columns [first, first + len(pages)); the last may be partial."""

    first: int
    pages: I32  # [n]
    partial: bool


class PageTable:
    """One group's tables. Slots are the rows of the device tables."""

    def __init__(self, layout: GroupLayout, index: int, pool: PagePool, sizes: tuple[int, int, int]) -> None:
        """sizes: (slots, max_model_len, unit_tokens). Raises ConfigError for what is not built yet."""
        num_slots, max_model_len, unit_tokens = sizes
        kind, window = layout.spec.kind, layout.spec.window
        if kind not in (GroupKind.FULL, GroupKind.WINDOW) or (kind is GroupKind.WINDOW) != (window is not None):
            raise ConfigError(f"cache group {index}: {kind.value} with window {window} is not supported")
        if layout.page_tokens % unit_tokens:
            raise ConfigError(
                f"cache group {index}: pages of {layout.page_tokens} tokens; expected a multiple of {unit_tokens}"
            )
        self.group = index
        self.pool_id = layout.pool
        self.pool = pool
        self.index = UnitIndex(pool)
        # a window of 1 sees itself alone; its row still keeps the page of the token before
        self.window = None if window is None else max(2, window)
        self.page_tokens = layout.page_tokens
        self.page_units = layout.page_tokens // unit_tokens  # m
        self.unit_tokens = unit_tokens
        max_columns = -(-max_model_len // self.page_tokens)
        self.pages = np.zeros((num_slots, max_columns), np.int32)  # [slots, max_columns], NULL_PAGE = none
        self.first_column = np.zeros(num_slots, np.int32)
        self.num_columns = np.zeros(num_slots, np.int32)  # end of the allocated columns
        self.capacity = np.zeros(num_slots, np.int32)  # num_columns * page_tokens
        self.trim_at = np.zeros(num_slots, np.int32)  # the first position that does not see first_column any more
        self._moved(np.arange(num_slots))

    def first_needed(self, position: int) -> int:
        """The first column that a query at `position` sees: it looks at (position - window, position]."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.page_tokens

    def max_held(self, num_tokens: int, chunk_tokens: int) -> int:
        """Most pages that one sequence of `num_tokens` holds at once, computed in chunks of at most `chunk_tokens`."""
        columns = -(-num_tokens // self.page_tokens)
        if self.window is None:
            return columns
        # a chunk and the window - 1 tokens before it touch one page more than they fill
        return min(columns, -(-(self.window - 1 + chunk_tokens) // self.page_tokens) + 1)

    # -- prefix hits ---------------------------------------------------------------------------------------------------

    def column_hit(self, keys: Sequence[bytes], column: int, num_units: int) -> tuple[int, int]:
        """(page, units): the page that holds most units of `column` among the first `num_units` of the chain."""
        first = column * self.page_units
        for unit in range(min(first + self.page_units, num_units) - 1, first - 1, -1):
            page = self.index.page_of.get(keys[unit])
            if page is not None:
                return page, unit + 1 - first
        return NULL_PAGE, 0

    def longest_hit(self, keys: Sequence[bytes], num_units: int, found: dict[int, tuple[int, int]]) -> int:
        """The most units <= num_units that this group can serve. `found` remembers column hits between calls.

        FULL: every column from 0. WINDOW: the columns that the next query sees; the longest such length is searched
        from the end, and a missing column moves the end in front of it.
        """
        if self.window is None:
            for column in range(-(-num_units // self.page_units)):
                hit = found[column] = self.column_hit(keys, column, num_units)
                if hit[1] < self.page_units:
                    return min(num_units, column * self.page_units + hit[1])
            return num_units
        length = num_units
        column = self._last_column(length)
        while length and column >= self.first_needed(length * self.unit_tokens):
            if column not in found:
                found[column] = self.column_hit(keys, column, num_units)
            units = found[column][1]
            if column * self.page_units + units < min(length, (column + 1) * self.page_units):
                length = column * self.page_units + units
                column = self._last_column(length)
            else:
                column -= 1
        return length

    def _last_column(self, num_units: int) -> int:
        return -(-num_units // self.page_units) - 1

    def hit(self, found: dict[int, tuple[int, int]], num_units: int) -> GroupHit:
        """The pages to read for a hit of `num_units`, from what `longest_hit` found."""
        first = self.first_needed(num_units * self.unit_tokens)
        columns = range(first, self._last_column(num_units) + 1)
        pages = np.array([found[column][0] for column in columns], np.int32)
        return GroupHit(first=first, pages=pages, partial=num_units % self.page_units != 0)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def set_columns(self, slot: int, first: int, pages: I32) -> None:
        """Begin a row with `pages` from column `first` on."""
        end = first + len(pages)
        self.pages[slot, first:end] = pages
        self.first_column[slot] = first
        self.num_columns[slot] = end
        self.capacity[slot] = end * self.page_tokens
        self._moved(slot)

    def _moved(self, slots: int | I64) -> None:
        """first_column has changed."""
        if self.window is not None:
            self.trim_at[slots] = (self.first_column[slots] + 1) * self.page_tokens + self.window - 1

    def missing(self, slots: I64, ends: I32) -> tuple[I64, I32] | None:
        """(row indexes, pages each) that tokens up to `ends` need beyond what is allocated; None when nothing."""
        short = ends - self.capacity[slots]
        rows = (short > 0).nonzero()[0]
        if not len(rows):
            return None
        counts: I32 = (short[rows] + (self.page_tokens - 1)) // self.page_tokens
        return rows, counts

    def append(self, slots: I64, counts: I32, pages: I32) -> tuple[I64, I32]:
        """Give `pages` to rows in order, counts[i] to slots[i] (distinct). -> (slots, columns) of each page."""
        columns = self.num_columns[slots]
        ends = columns + counts
        self.num_columns[slots] = ends
        self.capacity[slots] = ends * self.page_tokens
        if len(pages) != len(slots):
            starts = np.cumsum(counts, dtype=np.int32) - counts
            columns = np.repeat(columns - starts, counts) + np.arange(len(pages), dtype=np.int32)
            slots = np.repeat(slots, counts)
        self.pages[slots, columns] = pages
        return slots, columns

    def row_missing(self, slot: int, end: int) -> int:
        """Pages that tokens up to `end` of one row need beyond what is allocated."""
        return max(0, -((self.capacity.item(slot) - end) // self.page_tokens))

    def append_row(self, slot: int, pages: I32) -> tuple[I32, I32, I32]:
        """Give `pages` to one row. -> (slot, column, page) of each."""
        count, first = len(pages), self.num_columns.item(slot)
        end = first + count
        self.pages[slot, first:end] = pages
        self.num_columns[slot] = end
        self.capacity[slot] = end * self.page_tokens
        return np.full(count, slot, np.int32), np.arange(first, end, dtype=np.int32), pages

    def trim(self, slots: I64, positions: I32) -> None:
        """Release the pages that no query at or after positions[i] of slots[i] sees. WINDOW groups only."""
        if self.window is None:
            return
        rows = (positions >= self.trim_at[slots]).nonzero()[0]
        if not len(rows):
            return
        owners = slots[rows]
        keep = (positions[rows] - (self.window - 1)) // self.page_tokens
        first = self.first_column[owners]
        if np.count_nonzero(keep - first > 1) == 0:
            freed = self.pages[owners, first]
            self.pages[owners, first] = NULL_PAGE
            self.first_column[owners] = keep
            self.pool.release(freed)
        else:
            for slot, begin, end in zip(owners.tolist(), first.tolist(), keep.tolist(), strict=True):
                self.pool.release(self.pages[slot, begin:end][::-1].copy())
                self.pages[slot, begin:end] = NULL_PAGE
                self.first_column[slot] = end
        self._moved(owners)

    def clear_row(self, slot: int) -> None:
        """Release every page of a row, the deepest first, so that no child outlives its parent in the cache."""
        first, end = self.first_column.item(slot), self.num_columns.item(slot)
        row = self.pages[slot, first:end]
        self.pool.release(row[::-1], distinct=True)  # which copies
        row.fill(NULL_PAGE)
        self.first_column[slot] = self.num_columns[slot] = self.capacity[slot] = 0
        self._moved(slot)

    def check_integrity(self) -> None:
        """P-6: entries stand exactly in [first_column, num_columns). Raises InternalError."""
        columns = np.arange(self.pages.shape[1])
        held = (columns >= self.first_column[:, None]) & (columns < self.num_columns[:, None])
        check(((self.pages != NULL_PAGE) == held).all(), f"group {self.group}: a table entry outside of its range")
        check((self.capacity == self.num_columns * self.page_tokens).all(), f"group {self.group}: capacity is off")
        moved = self.trim_at.copy()
        self._moved(np.arange(len(moved)))
        check((moved == self.trim_at).all(), f"group {self.group}: trim_at is off")
        self.index.check_integrity(self.group)
