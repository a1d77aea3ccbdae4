"""PagePool: who holds each page of one pool, and which page is given out next. The KV manager owns one per pool.

Always true: every page except the null page is in exactly one of three places: referenced (refs > 0), cached (no refs,
some units keyed, in the eviction ring) or blank (no refs, no keys, on the stack). Pages are given out blank first, then
in the order in which they became unreferenced; nothing here touches a Python object per page.

The ring is never searched: each page knows its place in it, and one that is taken back out of it forgets that place,
which makes its entry stale; stale entries are dropped when the head reaches them or when the ring is compacted.
"""

from __future__ import annotations

import numpy as np

from engine.errors import check
from engine.step import I32, I64, NULL_PAGE

EMPTY: I32 = np.zeros(0, np.int32)


class PagePool:
    """num_pages: null page included."""

    def __init__(self, num_pages: int) -> None:
        check(num_pages >= 2, f"a pool of {num_pages} pages has none to give out")
        self.num_pages = num_pages
        self.refs = np.zeros(num_pages, np.int32)  # [P] holds by rows and by in-flight copies
        self.keyed = np.zeros(num_pages, np.bool_)  # [P] some unit of the page has a key; the prefix index writes it
        self.owner = np.zeros(num_pages, np.int32)  # [P] group that took the page last; the manager writes it
        self._blank = np.arange(num_pages - 1, NULL_PAGE, -1, dtype=np.int32)  # stack, low pages on top
        self._num_blank = num_pages - 1
        # twice the pages: after compaction at least num_pages entries are free, more than any release can push
        self._ring = np.zeros(2 * num_pages, np.int32)
        self._places = np.arange(1, 2 * num_pages + 1)  # 1 + index of each entry
        self._head = 0  # live and stale entries stand in [head, tail)
        self._tail = 0
        self._place = np.zeros(num_pages, np.int64)  # [P] 1 + index of the page's entry, 0 = not in the ring
        self._num_cached = 0
        self._scratch = np.zeros(num_pages, np.int32)

    @property
    def num_free(self) -> int:
        """Pages that `take` can give: blank and cached."""
        return self._num_blank + self._num_cached

    @property
    def num_cached(self) -> int:
        return self._num_cached

    def take(self, count: int) -> tuple[I32, I32]:
        """(pages [count] with one hold each, the evicted ones among them, whose keys the caller drops)."""
        check(count <= self.num_free, f"take({count}) with {self.num_free} free pages")
        from_blank = min(count, self._num_blank)
        self._num_blank -= from_blank
        # from the top down: pages of a row follow each other in memory, where they can
        pages = self._blank[self._num_blank : self._num_blank + from_blank][::-1].copy()
        evicted = EMPTY
        if from_blank < count:
            evicted = self._pop_cached(count - from_blank)
            pages = np.concatenate((pages, evicted))
        self.refs[pages.astype(np.int64)] = 1  # numpy indexes by i64 three times as fast as by i32
        return pages, evicted

    def _pop_cached(self, count: int) -> I32:
        found: list[I32] = []
        left = count
        while left:
            window = slice(self._head, min(self._head + left, self._tail))
            pages = self._ring[window]
            check(len(pages) > 0, "the eviction ring ran dry before its count did")
            live = pages[self._place[pages] == self._places[window]]
            self._place[live] = 0
            self._head = window.stop
            found.append(live)
            left -= len(live)
        self._num_cached -= count
        return np.concatenate(found)

    def share(self, pages: I32) -> None:
        """One more hold on each of `pages` (distinct): cached ones leave the ring."""
        cached = pages[self.refs[pages] == 0]
        if len(cached):
            check((self._place[cached] != 0).all(), "a blank page cannot be shared")
            self._place[cached] = 0
            self._num_cached -= len(cached)
        self.refs[pages] += 1

    def num_unreferenced(self, pages: I32) -> int:
        """How many of `pages` (distinct) are free now, so that sharing them takes them from `num_free`."""
        return int(np.count_nonzero(self.refs[pages] == 0))

    def release(self, pages: I32, *, distinct: bool = False) -> None:
        """Drop one hold per entry. Pages left without holds become free in this order: the first is evicted first.

        A page may stand in `pages` once per hold, unless the caller says that they are `distinct`. Releasing more often
        than held raises InternalError.
        """
        if not len(pages):
            return
        index = pages.astype(np.int64)  # numpy indexes by i64 three times as fast as by i32
        if distinct:
            left = self.refs[index]
            left -= 1
            self.refs[index] = left
        else:
            np.subtract.at(self.refs, index, 1)
            left = self.refs[index]
        free = index
        if np.count_nonzero(left):
            check(int(np.minimum.reduce(left)) >= 0, "a page was released more often than held")
            free = index[left == 0]
        if len(free) > 1 and not distinct:
            # a page named by several holds returns once: each entry finds who wrote last
            order = np.arange(len(free), dtype=np.int32)
            self._scratch[free] = order
            last = self._scratch[free] == order
            if np.count_nonzero(last) < len(free):
                free = free[last]
        if len(free):
            self._give_back(free)

    def _give_back(self, pages: I64) -> None:
        keyed = self.keyed[pages]
        count = int(np.count_nonzero(keyed))
        num_blank = len(pages) - count
        cached = pages
        if num_blank:
            if np.count_nonzero(keyed[num_blank:]) == count:
                # the deepest pages of a row stand first, and have no keys yet
                cached, blank = pages[num_blank:], pages[:num_blank]
            else:
                cached, blank = pages[keyed], pages[~keyed]
            self._blank[self._num_blank : self._num_blank + num_blank] = blank
            self._num_blank += num_blank
        if not count:
            return
        if self._tail + count > len(self._ring):
            self._compact()
        end = self._tail + count
        self._place[cached] = self._places[self._tail : end]
        self._ring[self._tail : end] = cached
        self._tail = end
        self._num_cached += count

    def _compact(self) -> None:
        live = self.eviction_order()
        count = len(live)
        self._ring[:count], self._place[live] = live, self._places[:count]
        self._head, self._tail = 0, count

    def lost_keys(self, pages: I32) -> None:
        """`pages` (distinct) have no key left: those that were cached become blank."""
        blank = pages[self._place[pages] != 0]
        if len(blank):
            self._place[blank] = 0
            self._num_cached -= len(blank)
            self._blank[self._num_blank : self._num_blank + len(blank)] = blank
            self._num_blank += len(blank)

    def eviction_order(self) -> I32:
        """Cached pages, the next to be evicted first."""
        pages = self._ring[self._head : self._tail]
        live: I32 = pages[self._place[pages] == self._places[self._head : self._tail]]
        return live

    def check_integrity(self) -> None:
        """P-1 and P-3: conservation, no page twice, categories disjoint. Raises InternalError."""
        blank = self._blank[: self._num_blank]
        cached = self.eviction_order()
        place = np.zeros(self.num_pages, np.int32)
        np.add.at(place, blank, 1)
        np.add.at(place, cached, 1)
        place[self.refs > 0] += 1
        place[NULL_PAGE] += 1
        check((place == 1).all(), f"pages in no place or in two: {np.flatnonzero(place != 1)[:8].tolist()}")
        check(self.refs.min() >= 0 and self.refs[NULL_PAGE] == 0, "negative holds, or the null page is held")
        check(len(cached) == self._num_cached, "the cached count is off")
        check(not self.keyed[blank].any(), "a blank page has keys")
        check(self.keyed[cached].all(), "a cached page has no keys")
