"""PrefixKeys: which unit keys a request has, who is computing which unit, and when units enter the prefix index.

Everything is keyed while the device works (the core loop calls in once a step is submitted). Known units (prompt, or
outputs of a preempted request) enter right after the step that computes them was submitted, so that the next step may
hit them: no more in a call than that step computes. Generated ones enter once collected, at most a few a call: rows
that fill a page together make no spike. A prompt is hashed as far as a lookup needs (to its first unknown page), the
rest when it is keyed.
"""

from __future__ import annotations

import numpy as np

from engine.errors import check
from engine.kv.manager import KeyedUnits, KVManager
from engine.kv.prefix_cache import TOKEN_BYTES, UnitChain, chain_keys, extend_chain
from engine.scheduler.queues import Entry
from engine.scheduler.table import NEVER_KEYED, RowTable

BATCH = 4  # generated units of a row that are keyed together
BATCH_RANGE = np.arange(BATCH, dtype=np.int64)
MIN_ROWS = 4  # rows a call, when there are few


class PrefixKeys:
    def __init__(self, table: RowTable, kv: KVManager, enabled: bool) -> None:
        self._table = table
        self._kv = kv
        self._enabled = enabled
        self._unit = kv.unit_tokens
        self._root = (-1, b"", b"")  # epoch, domain, their root key: most requests share the last one's
        # key of a known unit that is hashed and not keyed yet -> slot of the first to compute it
        self.computing: dict[bytes, int] = {}
        self._prefilling: dict[int, UnitChain] = {}  # slot -> its known units, until all are keyed

    def caches(self, entry: Entry) -> bool:
        """Sequences of one n > 1 request share their prompt even where the prefix cache is off."""
        return self._enabled or entry.request.parent is not None

    def keys(self, entry: Entry) -> UnitChain:
        """Keys of the entry's whole known units."""
        chain = entry.unit_keys
        if chain is None or entry.epoch != self._kv.epoch:
            request = entry.request
            domain = request.domain if self._enabled else request.domain + b"/n>1/%d" % (request.parent or 0)
            entry.epoch = self._kv.epoch
            if self._root[:2] != (entry.epoch, domain):
                self._root = (entry.epoch, domain, self._kv.root(domain))
            chain = entry.unit_keys = UnitChain(self._root[2], request.all_tokens(), self._unit)
        return chain

    def opened(self, slot: int, entry: Entry, num_hit_units: int) -> None:
        """A row begins with `num_hit_units` units in its pages."""
        if not self.caches(entry):
            return
        chain = self.keys(entry)
        entry.unit_keys = None
        self._table.num_keyed[slot] = num_hit_units
        self._table.tails[slot] = chain[num_hit_units - 1] if num_hit_units else chain.root
        if num_hit_units < len(chain):
            self._prefilling[slot] = chain
            self._announce(slot, chain, num_hit_units)

    def _announce(self, slot: int, chain: UnitChain, first: int) -> None:
        """The row computes unit `first` next: whoever needs it waits. Those behind it are told as they come near."""
        for key in chain.upto(first + 1)[first:]:
            self.computing.setdefault(key, slot)

    def commit_known(self) -> list[KeyedUnits]:
        """Key what the rows in prefill compute in submitted steps. -> what a failure of the last would withdraw."""
        keyed: list[KeyedUnits] = []
        table = self._table
        for slot, chain in list(self._prefilling.items()):
            first = table.num_keyed.item(slot)
            end = min(table.num_computed.item(slot) // self._unit, len(chain))
            if end == first:
                continue
            self._computed(slot, chain.keys[first:end])
            done = chain[first:end]
            keyed += self._kv.key_units(slot, done, first)
            table.num_keyed[slot] = end
            table.tails[slot] = done[-1]
            if end == len(chain):
                del self._prefilling[slot]
            else:
                self._announce(slot, chain, end)
        return keyed

    def _computed(self, slot: int, keys: list[bytes]) -> None:
        computing = self.computing
        for key in keys:
            if computing.get(key) == slot:
                del computing[key]

    def commit(self, num_tokens: int) -> int:
        """Key generated units that are collected: BATCH of a row at a time, of as many rows as fill so much in a step.

        num_tokens: that a step generates. A row fills BATCH units in BATCH x unit_tokens turns, so this keeps up.
        -> units keyed.
        """
        table, unit = self._table, self._unit
        due = (table.collected // unit - table.num_keyed >= BATCH).nonzero()[0]
        if not len(due):
            return 0
        due = due[: max(MIN_ROWS, num_tokens // (BATCH * unit) + 1)]
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
        first = table.num_keyed.item(slot)
        if first == NEVER_KEYED:
            return
        chain = self._prefilling.pop(slot, None)
        if chain is not None:
            self._computed(slot, chain.keys[first:])
        end = table.collected.item(slot) // unit
        if keep and end > first:
            keys = chain_keys(table.tails[slot], table.tokens[slot, first * unit : end * unit], unit)
            self._kv.key_units(slot, keys, first)

    def check_integrity(self) -> None:
        """Every key that is being computed belongs to a running row that has it before it. Raises InternalError."""
        for key, slot in self.computing.items():
            chain = self._prefilling.get(slot)
            check(chain is not None and key in chain.keys, f"a key is computed by slot {slot}, which does not")
        for slot, chain in self._prefilling.items():
            check(self._table.entries[slot] is not None, f"slot {slot} prefills and is not open")
            check(len(chain.keys) > self._table.num_keyed[slot], f"slot {slot}: what it computes next is not hashed")
