"""Asynchronous page transfers of the fake runner: they begin with a step and end some steps or polls later.

The remote side is a dict of page contents; runners that share one dict hand pages to each other. Checked: a transfer
touches no page that an uncollected step uses, and nobody changes its pages while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.fake_pages import PageContent, PagePool
from engine.errors import check
from engine.step import I32, I64, Transfers

LOAD, STORE = 0, 1


@dataclass(slots=True)
class Transfer:
    transfer_id: int
    kind: int
    pool: PagePool
    pages: I32
    source: str
    version: I64  # of the pages when it began
    turns: int


class TransferQueue:
    """Transfers of one replica, in the order in which they began."""

    def __init__(
        self, pools: list[PagePool], remote: dict[str, PageContent], turns: int, failing: frozenset[int]
    ) -> None:
        self.pools, self.remote, self.turns, self.failing = pools, remote, turns, failing
        self.active: list[Transfer] = []

    def begin(self, plan: Transfers, last_collected: int) -> None:
        """Start the plan's transfers. last_collected: the last step collected when the plan was submitted."""
        for i, transfer_id in enumerate(plan.transfer_id.tolist()):
            pool = self.pools[int(plan.pool[i])]
            pages = plan.pages.values[plan.pages.starts[i] : plan.pages.starts[i + 1]].copy()
            pool.check_ids(pages, f"transfer {transfer_id}")
            busy = pool.touched[pages] > last_collected
            check(not busy.any(), f"transfer {transfer_id}: pages {pages[busy].tolist()} belong to an uncollected step")
            kind = int(plan.kind[i])
            check(kind in (LOAD, STORE), f"transfer {transfer_id}: kind {kind}")
            if kind == LOAD:
                pool.fill[pages] = 0  # unreadable until it has arrived
            version = pool.version[pages].copy()
            turns = self.turns + 1  # the step that begins it counts as a turn too
            self.active.append(Transfer(transfer_id, kind, pool, pages, plan.source[i], version, turns))

    def turn(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """One step or poll has passed: -> (ids that finished, ids that failed)."""
        finished, failed, active = [], [], []
        for transfer in self.active:
            transfer.turns -= 1
            if transfer.turns > 0:
                active.append(transfer)
            elif transfer.transfer_id in self.failing or not self.end(transfer):
                failed.append(transfer.transfer_id)
            else:
                finished.append(transfer.transfer_id)
        self.active = active
        return tuple(finished), tuple(failed)

    def end(self, transfer: Transfer) -> bool:
        """Move the content; False when the remote side has none that fits."""
        pool, pages = transfer.pool, transfer.pages
        changed = pool.version[pages] != transfer.version
        check(not changed.any(), f"transfer {transfer.transfer_id}: pages {pages[changed].tolist()} changed meanwhile")
        if transfer.kind == STORE:
            self.remote[transfer.source] = pool.take(pages)
            return True
        content = self.remote.get(transfer.source)
        if content is None or content.tokens.shape != (len(pages), pool.page_tokens):
            return False
        pool.put(pages, content)
        return True

    def lose(self) -> tuple[int, ...]:
        """The cache is gone: everything that runs has failed."""
        lost = tuple(t.transfer_id for t in self.active)
        self.active = []
        return lost
