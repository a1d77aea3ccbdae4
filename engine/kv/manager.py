"""KVManager: pages, page tables and prefix keys of all groups of one replica. The scheduler is the only caller.

    find -> open_row -> grow -> key_units -> ... -> close_row

Always true: an operation over several pools is atomic (it gives everything or changes nothing); a page that is freed
while a step is in flight may be given to a step submitted later (the device runs steps in order); the source of a
partial copy is held until the step that copies is collected; keyed units are never rewritten. Deltas and copies gather
here until `take_deltas` and `take_copies` put them into the step's plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.errors import check
from engine.kv.groups import GroupHit, PageTable
from engine.kv.page_pool import PagePool
from engine.kv.prefix_cache import root_key
from engine.specs.cache import CacheLayout
from engine.step import I32, I64, PageCopies, PageDelta


@dataclass(frozen=True, slots=True)
class Hit:
    """The longest prefix valid in every group."""

    num_units: int
    groups: tuple[GroupHit, ...]


KeyedUnits = tuple[int, Sequence[bytes], I32]
"""(group, keys, the page of each): what a failed step has to withdraw."""


@dataclass(slots=True)
class Pending:
    """What gathers for the plan being built. Rows of `copies`: pool, source, target, tokens."""

    deltas: list[list[tuple[I32, I32, I32]]]
    copies: list[tuple[int, int, int, int]] = field(default_factory=list)


class KVManager:
    def __init__(self, layout: CacheLayout, num_slots: int, max_model_len: int, max_chunk: int) -> None:
        """max_chunk: most tokens of one request in a step."""
        self.unit_tokens = layout.unit_tokens
        self.pools = tuple(PagePool(pool.num_pages) for pool in layout.pools)
        sizes = (num_slots, max_model_len, layout.unit_tokens)
        self.tables = tuple(
            PageTable(group, index, self.pools[group.pool], sizes) for index, group in enumerate(layout.groups)
        )
        # tables of each pool
        self._sharing = [[t for t in self.tables if t.pool_id == i] for i in range(len(self.pools))]
        for pool, sharing in zip(self.pools, self._sharing, strict=True):
            pool.owner[:] = sharing[0].group if sharing else 0  # for good, where one group alone takes pages
        # a hit of a full group is looked for from its first page on, so that no more is hashed than is found
        self._asked = sorted(self.tables, key=lambda table: table.window is not None)
        self.max_chunk = max_chunk
        self.epoch = 0
        self._pending = Pending([[] for _ in self.tables])
        self.held_sources: list[tuple[int, int]] = []  # (pool, page) of copies in flight

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def pages_of(self, num_tokens: int) -> list[int]:
        """Most pages a pool, for one sequence of `num_tokens`."""
        need = [0] * len(self.pools)
        for table in self.tables:
            need[table.pool_id] += table.max_held(num_tokens, self.max_chunk)
        return need

    def capacity_tokens(self, limit: int) -> int:
        """The longest sequence <= limit that the pools can hold when it is alone."""
        fits, too_long = 0, limit + 1
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            ok = all(n < p.num_pages for n, p in zip(self.pages_of(middle), self.pools, strict=True))
            fits, too_long = (middle, too_long) if ok else (fits, middle)
        return fits

    def usage(self) -> float:
        """The part of the fullest pool that rows hold, in [0, 1]."""
        return max(1 - pool.num_free / (pool.num_pages - 1) for pool in self.pools)

    def num_free(self) -> list[int]:
        return [pool.num_free for pool in self.pools]

    def fits(self, need: Sequence[int]) -> bool:
        """Whether so many pages are free in each pool."""
        for pool, count in zip(self.pools, need, strict=True):  # noqa: SIM110 - all() makes a generator first: slow
            if count > pool.num_free:
                return False
        return True

    # -- prefix hits ---------------------------------------------------------------------------------------------------

    def root(self, domain: bytes) -> bytes:
        return root_key(domain, self.epoch)

    def find(self, keys: Sequence[bytes], max_units: int, *, partial: bool = True) -> Hit | None:
        """The longest hit of at most `max_units` units; whole pages alone unless `partial`."""
        length = min(max_units, len(keys))
        if not partial:
            length = self._whole_pages(length)
        found: list[dict[int, tuple[int, int]]] = [{} for _ in self.tables]
        agreed = 0  # groups in a row that accept this length
        at = 0
        while length and agreed < len(self.tables):
            table = self._asked[at]
            shorter = table.longest_hit(keys, length, found[table.group])
            agreed = agreed + 1 if shorter == length else 1
            length = shorter
            if not partial and self._whole_pages(length) < length:
                length, agreed = self._whole_pages(length), 0  # a window group has not been asked about this one
            at = (at + 1) % len(self.tables)
        if not length:
            return None
        return Hit(length, tuple(table.hit(found[i], length) for i, table in enumerate(self.tables)))

    def _whole_pages(self, num_units: int) -> int:
        step = int(np.lcm.reduce([table.page_units for table in self.tables]))
        return num_units // step * step

    def admission_need(self, hit: Hit | None, num_tokens: int) -> list[int]:
        """Free pages a pool that a row needs to reach `num_tokens`, beginning with `hit`."""
        need = [0] * len(self.pools)
        for table in self.tables:
            total = table.max_held(num_tokens, self.max_chunk)
            if hit is not None:
                group = hit.groups[table.group]
                # a hit page that somebody holds costs nothing; a copied one costs its target and pins its source
                taken = table.pool.num_unreferenced(group.pages)
                total = max(total - len(group.pages), 0) + taken + int(group.partial)
            need[table.pool_id] += total
        return need

    # -- rows ----------------------------------------------------------------------------------------------------------

    def open_row(self, slot: int, hit: Hit | None) -> None:
        """Begin a row with the pages of `hit`: whole pages by reference, a partial tail by copy."""
        if hit is None:
            return
        for table, group in zip(self.tables, hit.groups, strict=True):
            table.pool.share(group.pages)
        for table, group in zip(self.tables, hit.groups, strict=True):
            pages = group.pages
            if group.partial:
                source = int(pages[-1])
                pages = pages.copy()
                pages[-1] = target = int(self._take(table, 1)[0])
                end = group.first + len(pages)
                tokens = hit.num_units * self.unit_tokens - (end - 1) * table.page_tokens
                self._pending.copies.append((table.pool_id, source, target, tokens))
                self.held_sources.append((table.pool_id, source))
            table.set_columns(slot, group.first, pages)
            columns = np.arange(group.first, group.first + len(pages), dtype=np.int32)
            if len(pages):
                self._pending.deltas[table.group].append((np.full(len(pages), slot, np.int32), columns, pages))

    def _take(self, table: PageTable, count: int) -> I32:
        pool, sharing = table.pool, self._sharing[table.pool_id]
        pages, evicted = pool.take(count)
        if len(evicted):
            for other in sharing:
                other.index.drop_pages(evicted if len(sharing) == 1 else evicted[pool.owner[evicted] == other.group])
        if len(sharing) > 1:
            pool.owner[pages] = table.group
        return pages

    def grow(self, slots: I64, ends: I32) -> bool:
        """Allocate pages so that slots[i] (distinct) can hold ends[i] tokens. False and no change if they are short."""
        need = [0] * len(self.pools)
        parts = []
        for table in self.tables:
            missing = table.missing(slots, ends)
            if missing is not None:
                count = int(np.add.reduce(missing[1]))
                need[table.pool_id] += count
                parts.append((table, missing, count))
        if not parts:
            return True
        if not self.fits(need):
            return False
        for table, (rows, counts), count in parts:
            pages = self._take(table, count)
            owners, columns = table.append(slots[rows], counts, pages)
            self._pending.deltas[table.group].append((owners.astype(np.int32), columns, pages))
        return True

    def grow_row(self, slot: int, end: int) -> bool:
        """`grow` of one row, over plain numbers."""
        need = [0] * len(self.pools)
        for table in self.tables:
            need[table.pool_id] += table.row_missing(slot, end)
        if not self.fits(need):
            return False
        for table in self.tables:
            count = table.row_missing(slot, end)
            if count:
                self._pending.deltas[table.group].append(table.append_row(slot, self._take(table, count)))
        return True

    def has_spare(self, num_rows: int) -> bool:
        """Whether pages are so plenty that rows may take them some turns before they need them."""
        return self.fits([2 * num_rows * len(sharing) for sharing in self._sharing])  # two a row and group

    def holds(self, slot: int, end: int) -> bool:
        """Whether a row has the pages of its tokens up to `end` in every group."""
        for table in self.tables:  # noqa: SIM110 - as above
            if table.capacity.item(slot) < end:
                return False
        return True

    def hold(self, slots: I64, ends: I32) -> bool:
        """Whether every row has the pages of its tokens up to its end in every group."""
        return all(not np.count_nonzero(table.capacity[slots] < ends) for table in self.tables)

    def reserved(self, slots: I64, ends: I32) -> list[int]:
        """Pages a pool that the rows in `slots` will still ask for on their way to ends[i] tokens."""
        need = [0] * len(self.pools)
        for table in self.tables:
            missing = table.missing(slots, ends)
            if missing is None:
                continue
            rows, counts = missing
            if table.window is not None:
                held = table.num_columns[slots[rows]] - table.first_column[slots[rows]]
                limit = table.max_held(1 << 30, self.max_chunk)
                counts = np.clip(limit - held, 0, counts)
            need[table.pool_id] += int(counts.sum())
        return need

    def trim(self, slots: I64, positions: I32) -> None:
        """Window groups: release what no query at or after positions[i] of slots[i] sees."""
        for table in self.tables:
            table.trim(slots, positions)

    def close_row(self, slot: int) -> None:
        for table in self.tables:
            table.clear_row(slot)

    # -- keys ----------------------------------------------------------------------------------------------------------

    def key_units(self, slot: int, keys: Sequence[bytes], first: int) -> list[KeyedUnits]:
        """Key units [first, first + len(keys)) of a row. Known keys and pages behind a window are passed by."""
        keyed = []
        for table in self.tables:
            m = table.page_units
            base = first // m
            columns = table.pages[slot, base : -(-(first + len(keys)) // m)]
            pages = columns.copy() if m == 1 else np.repeat(columns, m)[first - base * m : first - base * m + len(keys)]
            table.index.add(keys, pages)
            keyed.append((table.group, keys, pages))
        return keyed

    def key_row_units(self, slots: I64, units: I32, keys: Sequence[bytes]) -> None:
        """Key some units of several rows: units[i, j] of slots[i] has keys[i * n + j], n units a row."""
        for table in self.tables:
            columns = units if table.page_units == 1 else units // table.page_units
            table.index.add(keys, table.pages[slots[:, None], columns].ravel())

    def withdraw(self, keyed: Sequence[KeyedUnits]) -> None:
        """Forget what these steps keyed; keys that map to another page were known before and stay."""
        for group, keys, pages in keyed:
            for key, page in zip(keys, pages.tolist(), strict=True):
                self.tables[group].index.withdraw(key, page)

    def forget_keys(self) -> None:
        """Every later lookup misses, also of chains that running rows still extend (the epoch is in the root key)."""
        self.epoch += 1
        for table in self.tables:
            table.index.clear()

    # -- what the plan takes -------------------------------------------------------------------------------------------

    def take_deltas(self) -> tuple[PageDelta | None, ...]:
        """Page-table changes since the last call, one entry a group; () when no group changed."""
        deltas = self._pending.deltas
        if not any(deltas):
            return ()
        self._pending.deltas = [[] for _ in self.tables]
        return tuple(merge_deltas(parts) for parts in deltas)

    def take_copies(self) -> tuple[PageCopies | None, list[tuple[int, int]]]:
        """(the copies of this step, the sources that stay held until it is collected)."""
        if not self._pending.copies:
            return None, []
        columns = np.array(self._pending.copies, np.int32).T
        pool, source, target, tokens = (np.ascontiguousarray(column) for column in columns)
        held = [(p, s) for p, s, _, _ in self._pending.copies]
        self._pending.copies = []
        return PageCopies(pool=pool, source=source, target=target, tokens=tokens), held

    def release_sources(self, held: Sequence[tuple[int, int]]) -> None:
        """The step that copied from these pages is collected."""
        for pool, page in held:
            self.held_sources.remove((pool, page))
            self.pools[pool].release(np.array([page], np.int32))

    def check_integrity(self) -> None:
        """P-1, P-2, P-3, P-6 over all pools, tables and indexes. Raises InternalError."""
        for pool_id, pool in enumerate(self.pools):
            holds = np.zeros(pool.num_pages, np.int64)
            for table in self.tables:
                if table.pool_id == pool_id:
                    holds += np.bincount(table.pages.ravel(), minlength=pool.num_pages)
            for held_pool, page in self.held_sources:
                if held_pool == pool_id:
                    holds[page] += 1
            holds[0] = 0
            wrong = np.flatnonzero(holds != pool.refs)
            check(not len(wrong), f"pool {pool_id}: holds of pages {wrong[:8].tolist()} differ from their counts")
            pool.check_integrity()
        for table in self.tables:
            table.check_integrity()


def merge_deltas(parts: list[tuple[I32, I32, I32]]) -> PageDelta | None:
    if not parts:
        return None
    if len(parts) == 1:
        slots, columns, pages = parts[0]
    else:
        slots, columns, pages = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return PageDelta(slots=slots, columns=columns, pages=pages)
