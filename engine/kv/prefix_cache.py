"""Prefix keys, and the index from a key to the page that holds its unit.

A key is SHA-256 over (parent key, the unit's tokens); the first parent is SHA-256 over the domain (tenant, salt,
adapter, media, weights version) and the epoch, so equal chains mean equal context and domain, at equal depth. The index
therefore stores the page alone: the unit's place in its page follows from its depth. A page that holds unit u of a
column holds the units before u of that column for the same chain, because a column is only ever filled from its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from engine.errors import check
from engine.kv.page_pool import PagePool
from engine.step import I32

TOKEN_BYTES = 4
KEY_BYTES = 32


def split_keys(joined: bytes) -> list[bytes]:
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def root_key(domain: bytes, epoch: int) -> bytes:
    """The parent of a sequence's first unit."""
    return sha256(b"twinfer unit 1" + epoch.to_bytes(8, "little") + domain).digest()


def chain_keys(parent: bytes, tokens: I32, unit_tokens: int) -> list[bytes]:
    """Keys of the whole units in `tokens` (i32 [n]), each chained to the one before, the first to `parent`."""
    data = tokens.tobytes()
    width = unit_tokens * TOKEN_BYTES
    keys = []
    for at in range(0, len(data) - width + 1, width):
        parent = sha256(parent + data[at : at + width]).digest()
        keys.append(parent)
    return keys


class UnitIndex:
    """Keys of one group's units. `pool.num_keys` is kept equal to the number of keys of each page."""

    def __init__(self, pool: PagePool) -> None:
        self.page_of: dict[bytes, int] = {}
        self._keys_of: dict[int, bytes] = {}  # the page's keys, one behind the other
        self._pool = pool

    def __len__(self) -> int:
        return len(self.page_of)

    def add_row(self, keys: Sequence[bytes], pages: Sequence[int]) -> list[tuple[bytes, int]]:
        """Map keys[i] to pages[i], which somebody holds. -> the pairs that are new.

        A key that is known keeps its first page; the null page (behind a window) is passed by.
        """
        page_of, keys_of = self.page_of, self._keys_of
        added = []
        for key, page in zip(keys, pages, strict=True):
            if page and key not in page_of:
                page_of[key] = page
                keys_of[page] = keys_of.get(page, b"") + key
                added.append((key, page))
        if added:
            np.add.at(self._pool.num_keys, [page for _, page in added], 1)
        return added

    def add_each(self, keys: Sequence[bytes], pages: I32) -> None:
        """As `add_row`, for one unit of each of several rows: the pages are distinct but for the null page."""
        page_of, keys_of = self.page_of, self._keys_of
        added = []
        for key, page in zip(keys, pages.tolist(), strict=True):
            if page and key not in page_of:
                page_of[key] = page
                keys_of[page] = keys_of.get(page, b"") + key
                added.append(page)
        self._pool.num_keys[pages if len(added) == len(pages) else added] += 1

    def drop_pages(self, pages: I32) -> None:
        """Evicted pages lose all of their keys."""
        page_of, keys_of = self.page_of, self._keys_of
        for page in pages.tolist():
            joined = keys_of.pop(page, b"")
            if len(joined) == KEY_BYTES:
                del page_of[joined]
            else:
                for key in split_keys(joined):
                    del page_of[key]
        self._pool.num_keys[pages] = 0

    def withdraw(self, key: bytes, page: int) -> None:
        """Forget `key` if it maps to `page`: the step that computed it failed."""
        if self.page_of.get(key) != page:
            return
        del self.page_of[key]
        keys = [other for other in split_keys(self._keys_of[page]) if other != key]
        self._pool.num_keys[page] = len(keys)
        if keys:
            self._keys_of[page] = b"".join(keys)
        else:
            del self._keys_of[page]
            self._pool.lost_keys(np.array([page], np.int32))

    def clear(self) -> None:
        """Forget everything; live page tables are not touched."""
        pages = np.array(list(self._keys_of), np.int32)
        self.page_of.clear()
        self._keys_of.clear()
        self._pool.num_keys[pages] = 0
        self._pool.lost_keys(pages)

    def check_integrity(self, group: int) -> None:
        """The two maps agree, and with the pool's counts. Raises InternalError."""
        named = sum(map(len, self._keys_of.values()))
        check(named == len(self.page_of) * KEY_BYTES, "index: the two maps differ in size")
        for page, joined in self._keys_of.items():
            keys = split_keys(joined)
            check(all(self.page_of.get(key) == page for key in keys), f"index: a key of page {page} points elsewhere")
            check(int(self._pool.num_keys[page]) == len(keys), f"index: page {page} has another number of keys")
            check(int(self._pool.owner[page]) == group, f"index: page {page} belongs to another group")
