"""The KV memory of the fake runner: pools of pages that hold what was written, and the checks that a GPU cannot make.

A page remembers, for each of its tokens, the id, and the digest of all tokens of the sequence up to and including it:
as in a real model, the KV of a token depends on everything before it. So a row that is given a wrong page, a stale one,
one of another sequence, or one with the right tokens behind the wrong context is found when it is read.

Always true: a digest depends on token ids and positions alone, never on pages, slots, chunks or neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.errors import check, fail
from engine.step import I32, I64, NULL_PAGE, U64

Bool = npt.NDArray[np.bool_]

NOBODY = -1


def mix64(x: U64) -> U64:
    """The finaliser of splitmix64 (Steele et al., 2014), elementwise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def token_digest(tokens: I32, positions: I32) -> U64:
    """What one token adds to the digest of its sequence. tokens, positions: i32 [T] -> u64 [T]."""
    return mix64(tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ mix64(positions.astype(np.uint64)))


@dataclass(slots=True)
class PageContent:
    """A copy of pages, as a remote store keeps it. n pages."""

    tokens: I32  # [n, page]
    digest: U64  # [n, page]
    context: U64  # [n]
    base: I32  # [n]
    fill: I32  # [n]


class PagePool:
    """Pages of one size. P pages of `page_tokens` tokens."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self.tokens = np.zeros((num_pages, page_tokens), np.int32)
        self.digest = np.zeros((num_pages, page_tokens), np.uint64)
        self.context = np.zeros(num_pages, np.uint64)  # digest before the page's first token
        self.base = np.zeros(num_pages, np.int32)  # position of the page's first token
        self.fill = np.zeros(num_pages, np.int32)  # tokens [0, fill) are written
        self.writer = np.full(num_pages, NOBODY, np.int64)  # tenancy that writes it; NOBODY after a copy or a load
        self.version = np.zeros(num_pages, np.int64)  # grows with every change
        self.touched = np.full(num_pages, -1, np.int64)  # the last step that read or wrote it
        self.now = -1  # the running step

    def clear(self) -> None:
        """The cache is lost: nothing is written any more."""
        self.fill[:] = 0
        self.version += 1

    def check_ids(self, pages: I32, what: str) -> None:
        if len(pages) and not (pages.min() > NULL_PAGE and pages.max() < self.num_pages):
            bad = pages[(pages <= NULL_PAGE) | (pages >= self.num_pages)][0]
            fail(f"{what}: page {bad} is not in [1, {self.num_pages})")

    def copy(self, source: I32, target: I32, tokens: I32) -> None:
        """The first tokens[i] of page source[i] to page target[i]. All copies read before any writes."""
        self.check_ids(source, "copy source")
        self.check_ids(target, "copy target")
        check(len(np.unique(target)) == len(target), f"two copies into one page: {target.tolist()}")
        check(not np.isin(source, target).any(), "a copy reads a page that another copy of the same step writes")
        check((tokens > 0).all() and (tokens <= self.page_tokens).all(), f"copies of {tokens.tolist()} tokens")
        for s, t, n in zip(source.tolist(), target.tolist(), tokens.tolist(), strict=True):
            check(self.fill[s] >= n, f"copy of {n} tokens from page {s}, of which {self.fill[s]} are written")
            self.tokens[t, :n], self.digest[t, :n] = self.tokens[s, :n], self.digest[s, :n]
            self.context[t], self.base[t] = self.context[s], self.base[s]
            self.fill[t] = n
        self.writer[target] = NOBODY
        self.version[target] += 1
        self.touched[target] = self.touched[source] = self.now

    def take(self, pages: I32) -> PageContent:
        return PageContent(
            self.tokens[pages], self.digest[pages], self.context[pages], self.base[pages], self.fill[pages]
        )

    def put(self, pages: I32, content: PageContent) -> None:
        self.tokens[pages], self.digest[pages] = content.tokens, content.digest
        self.context[pages], self.base[pages], self.fill[pages] = content.context, content.base, content.fill
        self.writer[pages] = NOBODY
        self.version[pages] += 1

    def write(self, pages: I32, places: I32, tokens: I32, digest: U64, context: U64, tenancy: I64) -> None:
        """Write one token each; every array [T], rows one after another, places ascending in a row.

        places: position in the sequence's storage (the page offset is places % page_tokens).
        digest, context: of the sequence including, and before, this token. tenancy: who writes.
        """
        if not len(pages):
            return
        self.check_ids(pages, "write")
        offsets = places % self.page_tokens
        first = np.ones(len(pages), np.bool_)  # first token of a run of tokens in one page by one row
        first[1:] = (pages[1:] != pages[:-1]) | (tenancy[1:] != tenancy[:-1])
        heads = pages[first]
        order = np.sort(heads)
        if (order[1:] == order[:-1]).any():
            fail(f"two rows write page {order[1:][order[1:] == order[:-1]][0]} in one step")
        at, base = offsets[first], places[first] - offsets[first]
        inside = at > 0  # goes on in a page that somebody began: it must be this tenancy, or a copied or loaded page
        if inside.any():
            self.check_continues(
                heads[inside], at[inside], base[inside], tenancy[first][inside], context[first][inside]
            )
        starts = first & (offsets == 0)
        self.base[pages[starts]], self.context[pages[starts]] = places[starts], context[starts]
        self.tokens[pages, offsets], self.digest[pages, offsets] = tokens, digest
        last = np.append(first[1:], True)
        self.fill[pages[last]] = offsets[last] + 1  # what stood behind belonged to rejected drafts
        self.writer[heads] = tenancy[first]
        self.version[heads] += 1
        self.touched[heads] = self.now

    def check_continues(self, pages: I32, offsets: I32, base: I32, tenancy: I64, context: U64) -> None:
        for bad, why in (
            (self.fill[pages] < offsets, "leaves a hole before"),
            (self.base[pages] != base, "lies at another position of its sequence, in"),
            ((self.writer[pages] != tenancy) & (self.writer[pages] != NOBODY), "goes into a page of another tenancy:"),
            (self.digest[pages, offsets - 1] != context, "does not continue the tokens before it in"),
        ):
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                fail(f"a write at offset {offsets[i]} {why} page {pages[i]}")

    def read(self, table: I32, start: I32, stop: I32) -> U64:
        """Digest of tokens [0, stop) of each row, after reading all of [start, stop) through its page table.

        table: i32 [n, columns]; start, stop: i32 [n]. A row with stop == 0 reads nothing and gives 0.
        """
        page = self.page_tokens
        low, high = start // page, -(-stop // page)  # columns [low, high)
        check(
            int(high.max(initial=0)) <= table.shape[1],
            f"a row reads {stop.max(initial=0)} tokens, beyond its page table",
        )
        width = int((high - low).max(initial=0))
        columns = low[:, None] + np.arange(width, dtype=np.int32)  # [n, width]
        live = columns < high[:, None]
        pages = np.take_along_axis(table, np.minimum(columns, table.shape[1] - 1), axis=1)
        pages = np.where(live, pages, NULL_PAGE)
        self.touched[pages] = self.now
        need = np.minimum(stop[:, None] - columns * page, page)
        last = self.digest[:, -1]
        linked = live[:, 1:] & (self.context[pages[:, 1:]] != last[pages[:, :-1]])
        for bad, why in (
            (live & (pages == NULL_PAGE), "the null page"),
            (live & (self.base[pages] != columns * page), "a page of other positions"),
            (live & (self.fill[pages] < need), "tokens that were never written"),
            (np.pad(linked, ((0, 0), (1, 0))), "a page that does not continue the page before it"),
            (live & (columns == 0) & (self.context[pages] != 0), "a first page that has a context"),
        ):
            if bad.any():
                r, c = (int(x[0]) for x in np.nonzero(bad))
                fail(
                    f"row {r} of {len(stop)} reads {why}: column {columns[r, c]}, page {pages[r, c]}, length {stop[r]}"
                )
        tail = np.maximum(stop - 1, 0)
        rows = np.arange(len(stop))
        ends = pages[rows, np.maximum(high - low - 1, 0)] if width else np.zeros(len(stop), np.int32)
        return np.where(stop > 0, self.digest[ends, tail % page], np.uint64(0))
