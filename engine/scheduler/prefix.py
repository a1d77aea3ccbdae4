"""PrefixKeys: which unit keys a request has, who is computing which unit, and when units enter the prefix index.

Known units (prompt, or outputs of a preempted request) are keyed when the step that computes them is submitted, so that
the next step may hit them; generated ones once collected. Those wait for `commit`, which the core loop calls while the
device works, and which keys at most a few units a call: rows that fill a page together make no spike.
"""

from __future__ import annotations

import numpy as np

from engine.errors import check
from engine.kv.manager import KeyedUnits, KVManager
from engine.kv.prefix_cache import TOKEN_BYTES, chain_keys, extend_chain
from engine.scheduler.queues import Entry
from engine.scheduler.table import NEVER_KEYED, RowTable

BATCH = 4  # generated units of a row that are keyed together
BATCH_RANGE = np.arange(BATCH, dtype=np.int32)
MIN_ROWS = 4  # rows a call, when there are few


class PrefixKeys:
    def __init__(self, table: RowTable, kv: KVManager, enabled: bool) -> None:
        self._table = table
        self._kv = kv
        self._enabled = enabled
        self._unit = kv.unit_tokens
        self.computing: dict[bytes, int] = {}  # key of a known unit that is not keyed yet -> slot of the first to do it
        self._prefilling: dict[int, list[bytes]] = {}  # slot -> keys of its known units, until all are keyed

    def caches(self, entry: Entry) -> bool:
        """Sequences of one n > 1 request share their prompt even where the prefix cache is off."""
        return self._enabled or entry.request.parent is not None

    def keys(self, entry: Entry) -> list[bytes]:
        """Keys of the entry's whole known units."""
        if entry.unit_keys is None or entry.epoch != self._kv.epoch:
            request = entry.request
            domain = request.domain if self._enabled else request.domain + b"/n>1/%d" % (request.parent or 0)
            entry.unit_keys = chain_keys(self._kv.root(domain), request.all_tokens(), self._unit)
            entry.epoch = self._kv.epoch
            entry.root = self._kv.root(domain)
        return entry.unit_keys

    def opened(self, slot: int, entry: Entry, num_hit_units: int) -> None:
        """A row begins with `num_hit_units` units in its pages."""
        if not self.caches(entry):
            return
        keys = self.keys(entry)
        table = self._table
        table.num_keyed[slot] = num_hit_units
        table.tails[slot] = keys[num_hit_units - 1] if num_hit_units else entry.root
        entry.unit_keys = None
        if num_hit_units < len(keys):
            self._prefilling[slot] = keys
            for key in keys[num_hit_units:]:
                self.computing.setdefault(key, slot)

    def submitted(self) -> list[KeyedUnits]:
        """Key what the rows in prefill compute in the step just planned. -> what its failure would withdraw."""
        keyed: list[KeyedUnits] = []
        table = self._table
        for slot, keys in list(self._prefilling.items()):
            first = int(table.num_keyed[slot])
            end = min(int(table.num_computed[slot]) // self._unit, len(keys))
            if end == first:
                continue
            done = keys[first:end]
            keyed += self._kv.key_units(slot, done, first)
            self._computed(slot, done)
            table.num_keyed[slot] = end
            table.tails[slot] = keys[end - 1]
            if end == len(keys):
                del self._prefilling[slot]
        return keyed

    def _computed(self, slot: int, keys: list[bytes]) -> None:
        computing = self.computing
        for key in keys:
            if computing.get(key) == slot:
                del computing[key]

    def commit(self, num_rows: int) -> int:
        """Key generated units that are collected: BATCH of a row at a time, of as many rows as fill so much in a step.

        A row fills BATCH units in BATCH x unit_tokens steps, so this keeps up. -> units keyed.
        """
        table, unit = self._table, self._unit
        due = np.flatnonzero(table.collected // unit - table.num_keyed >= BATCH)
        if not len(due):
            return 0
        due = due[: max(MIN_ROWS, num_rows // (BATCH * unit) + 1)]
        units = table.num_keyed[due][:, None] + BATCH_RANGE  # [n, BATCH]
        data = table.units[due[:, None], units].tobytes()
        width = unit * TOKEN_BYTES
        tails = table.tails
        keys: list[bytes] = []
        for at, slot in enumerate(due.tolist()):
            part = data[at * BATCH * width : (at + 1) * BATCH * width]
            tails[slot] = extend_chain(keys, tails[slot], part, width)
        self._kv.key_row_units(due, units, keys)
        table.num_keyed[due] = units[:, -1] + 1
        return len(keys)

    def forget(self) -> None:
        """Every later lookup misses. Running rows key nothing any more: their chains belong to the epoch that ended."""
        self._kv.forget_keys()
        self._prefilling.clear()
        self.computing.clear()
        self._table.num_keyed[:] = NEVER_KEYED

    def closing(self, slot: int, *, keep: bool) -> None:
        """A row ends: key its collected units (`keep`), and let others compute what it will not."""
        table, unit = self._table, self._unit
        first = int(table.num_keyed[slot])
        if first == NEVER_KEYED:
            return
        known = self._prefilling.pop(slot, None)
        if known is not None:
            self._computed(slot, known[first:])
        end = int(table.collected[slot]) // unit
        if keep and end > first:
            keys = chain_keys(table.tails[slot], table.tokens[slot, first * unit : end * unit], unit)
            self._kv.key_units(slot, keys, first)

    def check_integrity(self) -> None:
        """Every key that is being computed belongs to a running row that has it before it. Raises InternalError."""
        for key, slot in self.computing.items():
            known = self._prefilling.get(slot)
            check(known is not None and key in known, f"a key is computed by slot {slot}, which does not")
        for slot in self._prefilling:
            check(self._table.entries[slot] is not None, f"slot {slot} prefills and is not open")
