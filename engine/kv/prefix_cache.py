"""Prefix keys, and the index from a key to the page that holds its unit.

A key is SHA-256 over (parent key, the unit's tokens); the first parent is SHA-256 over the domain (tenant, salt,
adapter, media, weights version) and the epoch, so equal chains mean equal context and domain, at equal depth. The index
therefore stores the page alone: the unit's place in its page follows from its depth. A page that holds unit u of a
column holds the units before u of that column for the same chain, because a column is only ever filled from its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import overload

import numpy as np

from engine.errors import check
from engine.kv.page_pool import PagePool
from engine.step import I32, NULL_PAGE

TOKEN_BYTES = 4
KEY_BYTES = 32
EMPTY_HASH = sha256()  # never updated: copying it is quicker than asking OpenSSL for another


def split_keys(joined: bytes) -> list[bytes]:
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def root_key(domain: bytes, epoch: int) -> bytes:
    """The parent of a sequence's first unit."""
    return sha256(b"twinfer unit 1" + epoch.to_bytes(8, "little") + domain).digest()


def chain_keys(parent: bytes, tokens: I32, unit_tokens: int) -> list[bytes]:
    """Keys of the whole units in `tokens` (i32 [n]), each chained to the one before, the first to `parent`."""
    keys: list[bytes] = []
    extend_chain(keys, parent, tokens.tobytes(), unit_tokens * TOKEN_BYTES)
    return keys


def extend_chain(keys: list[bytes], key: bytes, data: bytes, width: int) -> bytes:
    """Append the keys of the units of `width` bytes in `data`, the first chained to `key`. -> the last key."""
    fresh = EMPTY_HASH.copy
    for at in range(0, len(data) - width + 1, width):
        unit = fresh()
        unit.update(key + data[at : at + width])
        key = unit.digest()
        keys.append(key)
    return key


class UnitChain(Sequence[bytes]):
    """Keys of the whole units of a sequence, hashed when somebody asks: a lookup ends at the first unknown page.

    root: the parent of the first unit. tokens: i32 [n], never changed. keys: those hashed so far, from the first on.
    """

    __slots__ = ("_tokens", "_unit", "keys", "num_units", "root")

    def __init__(self, root: bytes, tokens: I32, unit_tokens: int) -> None:
        self.root = root
        self.keys: list[bytes] = []
        self.num_units = len(tokens) // unit_tokens
        self._tokens = tokens
        self._unit = unit_tokens

    def __len__(self) -> int:
        return self.num_units

    @overload
    def __getitem__(self, unit: int) -> bytes: ...
    @overload
    def __getitem__(self, unit: slice) -> list[bytes]: ...
    def __getitem__(self, unit: int | slice) -> bytes | list[bytes]:
        end = unit + 1 if isinstance(unit, int) else unit.indices(self.num_units)[1]
        if end > len(self.keys):
            self.upto(end)
        return self.keys[unit]

    def upto(self, end: int) -> list[bytes]:
        """The keys hashed so far, at least those of the first `end` units; end <= len(self)."""
        keys, unit = self.keys, self._unit
        done = len(keys)
        if end > done:
            data = self._tokens[done * unit : end * unit].tobytes()
            extend_chain(keys, keys[-1] if done else self.root, data, unit * TOKEN_BYTES)
        return keys


class UnitIndex:
    """Keys of one group's units. Keeps `pool.keyed`: which pages have a key."""

    def __init__(self, pool: PagePool) -> None:
        self.page_of: dict[bytes, int] = {}
        self._keys_of = [b""] * pool.num_pages  # each page's keys, one behind the other
        self._pool = pool

    def __len__(self) -> int:
        return len(self.page_of)

    def add(self, keys: Sequence[bytes], pages: I32) -> list[int]:
        """Map keys[i] to pages[i], which somebody holds. -> the i that are not new.

        A key that is known keeps its first page; the null page (behind a window) is passed by.
        """
        page_of, keys_of, numbers = self.page_of, self._keys_of, pages.tolist()
        passed: list[int] = []
        if NULL_PAGE not in numbers and page_of.keys().isdisjoint(keys) and len(set(keys)) == len(numbers):
            # all are new, as nearly always
            page_of.update(zip(keys, numbers, strict=True))
            for key, page in zip(keys, numbers, strict=True):
                keys_of[page] += key
        else:
            for at, (key, page) in enumerate(zip(keys, numbers, strict=True)):
                if page != NULL_PAGE and key not in page_of:
                    page_of[key] = page
                    keys_of[page] += key
                else:
                    passed.append(at)
            pages = np.delete(pages, passed)
        self._pool.keyed[pages.astype(np.int64)] = True
        return passed

    def drop_pages(self, pages: I32) -> None:
        """Evicted pages lose all of their keys."""
        page_of, keys_of = self.page_of, self._keys_of
        for page in pages.tolist():
            joined = keys_of[page]
            keys_of[page] = b""
            if len(joined) == KEY_BYTES:
                del page_of[joined]
            else:
                for key in split_keys(joined):
                    del page_of[key]
        self._pool.keyed[pages] = False

    def withdraw(self, key: bytes, page: int) -> None:
        """Forget `key` if it maps to `page`: the step that computed it failed."""
        if self.page_of.get(key) != page:
            return
        del self.page_of[key]
        self._keys_of[page] = b"".join(other for other in split_keys(self._keys_of[page]) if other != key)
        if not self._keys_of[page]:
            self._pool.keyed[page] = False
            self._pool.lost_keys(np.array([page], np.int32))

    def clear(self) -> None:
        """Forget everything; live page tables are not touched."""
        pages = np.array(sorted(set(self.page_of.values())), np.int32)
        self.page_of.clear()
        self._keys_of = [b""] * self._pool.num_pages
        self._pool.keyed[pages] = False
        self._pool.lost_keys(pages)

    def check_integrity(self, group: int) -> None:
        """The two maps agree, and with the pool's counts. Raises InternalError."""
        named = sum(map(len, self._keys_of))
        check(named == len(self.page_of) * KEY_BYTES, "index: the two maps differ in size")
        for page, joined in enumerate(self._keys_of):
            if not joined:
                continue
            keys = split_keys(joined)
            check(all(self.page_of.get(key) == page for key in keys), f"index: a key of page {page} points elsewhere")
            check(bool(self._pool.keyed[page]), f"index: page {page} is not marked as keyed")
            check(int(self._pool.owner[page]) == group, f"index: page {page} belongs to another group")
