"""Hypothesis drives the KV manager alone: P-1 to P-3 and P-6 to P-14 of properties.md, over hybrid groups and pools.

The model beside it is the definition: a hit is the longest length at which every group has each needed column's page,
by brute force; the pages' contents are what the rows wrote, so that a key on a rewritten page is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import InternalError
from engine.kv.manager import Hit, KeyedUnits, KVManager
from engine.kv.page_pool import PagePool
from engine.kv.prefix_cache import UnitChain, chain_keys, root_key
from tests.engine.kv.layouts import small_layout

MAX_LEN = 96
SLOTS = 5
DOMAINS = (b"a", b"b")
# (windows of the groups, pool of each)
LAYOUTS = (((None,), (0,)), ((6,), (0,)), ((None, 5), (0, 0)), ((None, 9), (0, 1)), ((3, None, 8), (0, 1, 0)))


@dataclass(slots=True)
class Row:
    """A row of the model. computed: tokens written so far. keyed: units keyed."""

    domain: bytes
    tokens: np.ndarray
    keys: list[bytes]
    epoch: int
    computed: int
    keyed: int
    keyed_units: list[KeyedUnits] = field(default_factory=list)


class ManagerMachine(RuleBasedStateMachine):
    kv: KVManager

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        self.unit = data.draw(st.sampled_from([1, 2, 4]))
        page = self.unit * data.draw(st.sampled_from([1, 2, 4]))
        windows, pools = data.draw(st.sampled_from(LAYOUTS))
        num_pages = data.draw(st.integers(4, 60))
        self.kv = KVManager(small_layout(windows, pools, num_pages, page, self.unit), SLOTS, MAX_LEN, 16)
        self.rows: dict[int, Row] = {}
        self.contents: dict[tuple[int, int, int], tuple[bytes, int, tuple[int, ...]]] = {}
        self.held: list[list[tuple[int, int]]] = []  # copies in flight

    # rules

    @precondition(lambda self: len(self.rows) < SLOTS)
    @rule(
        domain=st.sampled_from(DOMAINS), stem=st.integers(0, 2), length=st.integers(1, MAX_LEN), partial=st.booleans()
    )
    def open(self, domain: bytes, stem: int, length: int, partial: bool) -> None:
        tokens = self.prompt(stem, length)
        keys = chain_keys(self.kv.root(domain), tokens, self.unit)
        most = (length - 1) // self.unit
        chain = UnitChain(self.kv.root(domain), tokens, self.unit)
        hit = self.kv.find(chain, most, partial=partial)
        self.check_chain(chain, keys)
        step = 1 if partial else self.kv.tables[0].page_units
        assert (0 if hit is None else hit.num_units) == self.longest(keys, most, step)
        found = 0 if hit is None else hit.num_units
        assert found * self.unit <= length - 1
        need = self.kv.admission_need(hit, found * self.unit + 1)
        if any(n > pool.num_free for n, pool in zip(need, self.kv.pools, strict=True)):
            return
        slot = next(s for s in range(SLOTS) if s not in self.rows)
        self.check_hit(hit, domain, tokens)
        self.kv.open_row(slot, hit)
        copies, held = self.kv.take_copies()
        self.held.append(held)
        if copies is not None:
            for pool, source, target, count in zip(
                copies.pool, copies.source, copies.target, copies.tokens, strict=True
            ):
                assert source != target and 0 < count < self.kv.tables[0].page_tokens
                for at in range(count):
                    self.contents[int(pool), int(target), at] = self.contents[int(pool), int(source), at]
        self.rows[slot] = Row(domain, tokens, keys, self.kv.epoch, found * self.unit, found)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.integers(1, 16), one=st.booleans())
    def compute(self, data: st.DataObject, count: int, one: bool) -> None:
        """Trim, grow, write, key: what a step does to a row."""
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        row = self.rows[slot]
        end = min(row.computed + count, len(row.tokens))
        if end == row.computed:
            return
        slots = np.array([slot], np.int32)
        self.kv.trim(slots, np.array([row.computed], np.int32))
        before = self.snapshot()
        if not (self.kv.grow_row(slot, end) if one else self.kv.grow(slots, np.array([end], np.int32))):
            assert self.snapshot() == before, "P-10: a failed allocation changed something"
            return
        assert self.kv.holds(slot, end) and self.kv.hold(slots, np.array([end], np.int32))
        for table in self.kv.tables:
            for position in range(row.computed, end):
                page = int(table.pages[slot, position // table.page_tokens])
                context = tuple(row.tokens[: position + 1].tolist())
                self.contents[table.pool_id, page, position % table.page_tokens] = (row.domain, position, context)
        row.computed = end
        if row.epoch == self.kv.epoch:
            units = end // self.unit
            row.keyed_units += self.kv.key_units(slot, row.keys[row.keyed : units], row.keyed)
            row.keyed = max(row.keyed, units)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        del self.rows[slot]
        self.kv.close_row(slot)
        self.kv.close_row(slot)  # P-12: nothing is left to release

    @precondition(lambda self: self.held)
    @rule()
    def collect(self) -> None:
        self.kv.release_sources(self.held.pop(0))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """P-7: a failed step takes its keys back; the row itself starts again."""
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        row = self.rows.pop(slot)
        self.kv.withdraw(row.keyed_units)
        self.kv.withdraw(row.keyed_units)
        for group, keys, pages in row.keyed_units:
            for key, page in zip(keys, pages.tolist(), strict=True):
                assert self.kv.tables[group].index.page_of.get(key) != page or not page
        self.kv.close_row(slot)

    @rule()
    def reset(self) -> None:
        tables = [table.pages.copy() for table in self.kv.tables]
        self.kv.forget_keys()
        assert all((a == t.pages).all() for a, t in zip(tables, self.kv.tables, strict=True))
        assert all(pool.num_cached == 0 for pool in self.kv.pools)

    # the model

    def prompt(self, stem: int, length: int) -> np.ndarray:
        tokens = np.random.default_rng(stem).integers(0, 50, MAX_LEN).astype(np.int32)
        if stem == 1:  # begins as 0 does
            tokens[:20] = self.prompt(0, 20)
        return tokens[:length]

    def longest(self, keys: list[bytes], most: int, step: int) -> int:
        """By brute force, of the multiples of `step` units."""
        for units in range(min(most, len(keys)) // step * step, 0, -step):
            if all(self.serves(table, keys, units, most) for table in self.kv.tables):
                return units
        return 0

    def serves(self, table: object, keys: list[bytes], units: int, most: int) -> bool:
        m, index = table.page_units, table.index.page_of  # type: ignore[attr-defined]
        position = units * self.unit
        window = table.window  # type: ignore[attr-defined]
        first = 0 if window is None else max(0, position - window + 1) // (m * self.unit)
        for column in range(first, -(-units // m)):
            needed = min(units - column * m, m)
            places = range(column * m + needed - 1, min((column + 1) * m, most))
            if not any(keys[u] in index for u in places):
                return False
        return True

    def check_chain(self, chain: UnitChain, keys: list[bytes]) -> None:
        """Keys made one by one are those made at once; a full group asks for no page beyond its first miss."""
        if any(table.window is None for table in self.kv.tables):
            table = next(table for table in self.kv.tables if table.window is None)
            most = table.longest_hit(keys, len(keys), {})
            assert len(chain.keys) <= (most // table.page_units + 1) * table.page_units
        assert chain.keys == keys[: len(chain.keys)] and len(chain) == len(keys)
        assert list(chain) == keys and chain[1:3] == keys[1:3]

    def check_hit(self, hit: Hit | None, domain: bytes, tokens: np.ndarray) -> None:
        """P-7, P-8, P-13: what is hit was written, by this chain in this domain."""
        if hit is None:
            return
        for table, group in zip(self.kv.tables, hit.groups, strict=True):
            for at, page in enumerate(group.pages.tolist()):
                begin = (group.first + at) * table.page_tokens
                for position in range(begin, min(begin + table.page_tokens, hit.num_units * self.unit)):
                    written = self.contents[table.pool_id, page, position % table.page_tokens]
                    assert written == (domain, position, tuple(tokens[: position + 1].tolist()))

    def snapshot(self) -> tuple[object, ...]:
        pools = [(pool.num_free, pool.num_cached, pool.refs.tobytes(), pool.keyed.tobytes()) for pool in self.kv.pools]
        tables = [
            (t.pages.tobytes(), t.num_columns.tobytes(), t.capacity.tobytes(), len(t.index)) for t in self.kv.tables
        ]
        return (*pools, *tables)

    @invariant()
    def integrity(self) -> None:
        self.kv.check_integrity()

    @invariant()
    def rows_keep_what_they_wrote(self) -> None:
        """P-4, P-5: no page that a row may still read was given to another."""
        for slot, row in self.rows.items():
            for table in self.kv.tables:
                first = table.first_needed(row.computed)
                assert int(table.first_column[slot]) <= first
                for position in range(first * table.page_tokens, row.computed):
                    page = int(table.pages[slot, position // table.page_tokens])
                    written = self.contents[table.pool_id, page, position % table.page_tokens]
                    assert written[0] == row.domain and written[1] == position
                    assert written[2] == tuple(row.tokens[: position + 1].tolist())

    def teardown(self) -> None:
        if not hasattr(self, "rows"):
            return
        for slot in list(self.rows):
            self.kv.close_row(slot)
        for held in self.held:
            self.kv.release_sources(held)
        self.kv.check_integrity()
        assert all(pool.num_free == pool.num_pages - 1 for pool in self.kv.pools), "P-11"


ManagerMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestManager = ManagerMachine.TestCase


def test_eviction_takes_the_longest_unused_page_and_the_deepest_first() -> None:
    """P-9."""
    kv = KVManager(small_layout((None,), (0,), 9, 4, 4), 4, 64, 64)
    table = kv.tables[0]
    tokens = [np.arange(8, dtype=np.int32), np.arange(100, 108, dtype=np.int32)]
    chains = [chain_keys(kv.root(b""), t, 4) for t in tokens]
    for slot in (0, 1):
        assert kv.grow(np.array([slot], np.int32), np.array([8], np.int32))
        kv.key_units(slot, chains[slot], 0)
    order = [table.pages[slot, column] for slot in (0, 1) for column in (1, 0)]
    kv.close_row(0)
    kv.close_row(1)
    assert table.pool.eviction_order().tolist() == order
    # a hit on the first chain makes it the most recently used
    hit = kv.find(chains[0], 2)
    kv.open_row(2, hit)
    kv.close_row(2)
    assert table.pool.eviction_order().tolist() == order[2:] + order[:2]
    # four blank pages first, then the second chain from its end: its first unit is hit as long as possible
    assert kv.grow(np.array([3], np.int32), np.array([20], np.int32))
    found = kv.find(chains[1], 2)
    assert found is not None and found.num_units == 1
    assert len(table.index) == 3


def test_a_page_is_released_once_for_each_hold() -> None:
    """P-3: repeats in one list drop one hold each; one more than held is refused."""
    pool = PagePool(4)
    page, _ = pool.take(1)
    pool.share(page)
    pool.release(np.concatenate((page, page)))
    assert pool.num_free == 3
    pool.check_integrity()
    with pytest.raises(InternalError):
        pool.release(page)


def test_more_than_there_is_cannot_be_taken() -> None:
    pool = PagePool(4)
    with pytest.raises(InternalError):
        pool.take(4)


def test_keys_depend_on_every_part_of_the_context() -> None:
    """P-8, R18: domain, epoch, every token, the order, the parent."""
    tokens = np.arange(32, dtype=np.int32)
    roots = {root_key(domain, epoch) for domain in (b"", b"a", b"b", b"ab") for epoch in (0, 1)}
    assert len(roots) == 8
    keys = {key for root in roots for key in chain_keys(root, tokens, 16)}
    for at in (0, 15, 16, 31):
        changed = tokens.copy()
        changed[at] += 1
        keys |= set(chain_keys(root_key(b"", 0), changed, 16))
    swapped = np.concatenate((tokens[16:], tokens[:16]))
    keys |= set(chain_keys(root_key(b"", 0), swapped, 16))
    assert len(keys) == 8 * 2 + 2 + 2 + 1 + 1 + 2
