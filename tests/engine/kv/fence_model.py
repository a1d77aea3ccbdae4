"""An explicit-state model of who may use a page when: rows, steps in flight, transfers, aborts (properties.md, 3.3).

Small scope: R requests that want 1 .. W pages each, B pages, up to D steps in flight; the transfer of an aborted
request may end late, or never (its peer died), and then a deadline ends it. Every rule can be switched off, and must
then be missed: `explore` finds a shortest trace to a violation, or states from which the pages never all come back.

Two fences are modelled. "strict": a page of a step in flight is not free. "order" is what the engine does: the device
runs steps in order, so a freed page may be given to a step submitted later at once; a transfer runs beside the steps,
so it may be given a page only when every step that names it is collected. test_fence_model.py replays traces on the
manager.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

REQUESTS, PAGES, WANTED, DEPTH = 2, 3, 2, 2


@dataclass(frozen=True, slots=True)
class Rules:
    fence: str = "order"  # order | strict | off
    deadline: bool = True  # a transfer whose peer died is given up
    stale_guard: bool = True  # an event for a request that is gone is counted, not asserted
    dedup: bool = True  # a page listed twice in one release returns once


@dataclass(frozen=True, slots=True)
class Row:
    """status: N new, W waiting, R running, A ended and draining, F gone. transfer: 0 none, 1 live, 2 peer dead."""

    status: str = "N"
    pages: tuple[int, ...] = ()
    transfer: int = 0


@dataclass(frozen=True, slots=True)
class State:
    rows: tuple[Row, ...]
    free: tuple[int, ...]  # ascending; a page twice = freed twice
    in_flight: tuple[frozenset[tuple[int, int]], ...] = ()  # (page, request) that each step writes, the oldest first
    dead: bool = False


Action = tuple[str, int]
INITIAL = State(tuple(Row() for _ in range(REQUESTS)), tuple(range(PAGES)))


def pinned(state: State) -> set[int]:
    return {page for step in state.in_flight for page, _ in step}


def replace_row(state: State, i: int, row: Row, **changes: object) -> State:
    rows = (*state.rows[:i], row, *state.rows[i + 1 :])
    fields = {"free": state.free, "in_flight": state.in_flight, "dead": state.dead, **changes}
    return State(rows, **fields)  # type: ignore[arg-type]


def successors(state: State, rules: Rules) -> Iterator[tuple[Action, State]]:
    if state.dead:
        return
    for i, row in enumerate(state.rows):
        if row.status in "NW":
            yield from beginnings(state, i, row, rules)
        if row.status == "R":
            yield from turns(state, i, row)
        if row.status in "RW":
            yield ("abort", i), replace_row(state, i, Row("A", row.pages, row.transfer))
        if row.status == "A":
            yield from endings(state, i, row, rules)
        if row.status == "F" and not rules.stale_guard:
            yield ("stale_event", i), replace_row(state, i, row, dead=True)
        if row.transfer == 1:
            yield ("xfer_done", i), replace_row(state, i, Row(row.status, row.pages))
    if state.in_flight:
        yield ("device_done", -1), State(state.rows, state.free, state.in_flight[1:])


def beginnings(state: State, i: int, row: Row, rules: Rules) -> Iterator[tuple[Action, State]]:
    if row.status == "N":
        yield ("submit", i), replace_row(state, i, Row("W"))
    elif state.free:
        page, rest = state.free[0], state.free[1:]
        yield ("admit", i), replace_row(state, i, Row("R", (page,)), free=rest)
        # a transfer is not in the device's order: under "order" its page must be out of every step in flight
        for at, target in enumerate(state.free):
            if rules.fence == "order" and target in pinned(state):
                continue
            others = state.free[:at] + state.free[at + 1 :]
            yield ("admit_remote", i), replace_row(state, i, Row("R", (target,), 1), free=others)
            break


def turns(state: State, i: int, row: Row) -> Iterator[tuple[Action, State]]:
    if len(state.in_flight) < DEPTH and row.transfer == 0:
        step = frozenset((page, i) for page in row.pages)
        yield ("step", i), State(state.rows, state.free, (*state.in_flight, step))
        if len(row.pages) < WANTED and state.free:
            grown = (*row.pages, state.free[0])
            step = frozenset((page, i) for page in grown)
            changed = replace_row(state, i, Row("R", grown), free=state.free[1:])
            yield ("grow_step", i), State(changed.rows, changed.free, (*state.in_flight, step))
    if len(row.pages) == 1:
        yield ("relist", i), replace_row(state, i, Row("R", row.pages * 2, row.transfer))


def endings(state: State, i: int, row: Row, rules: Rules) -> Iterator[tuple[Action, State]]:
    busy = row.transfer != 0 or (rules.fence == "strict" and bool(pinned(state) & set(row.pages)))
    if not busy:
        pages = tuple(dict.fromkeys(row.pages)) if rules.dedup else row.pages
        free = tuple(sorted(state.free + pages))
        yield ("reclaim", i), replace_row(state, i, Row("F"), free=free)
    if row.transfer == 1:
        yield ("peer_dies", i), replace_row(state, i, Row("A", row.pages, 2))
    if row.transfer == 2 and rules.deadline:
        yield ("deadline", i), replace_row(state, i, Row("A", row.pages))


def violation(state: State, rules: Rules) -> str | None:
    if state.dead:
        return "the engine died of a stale event"
    if len(set(state.free)) != len(state.free):
        return "double free"
    owned = [set(row.pages) for row in state.rows]
    if set().union(*owned) & set(state.free):
        return "use after free: a row's page is free"
    if set(state.free).union(*owned) != set(range(PAGES)):
        return "leak"
    if any(owned[i] & owned[j] for i in range(REQUESTS) for j in range(i)):
        return "two rows write one page"
    if rules.fence == "strict" and pinned(state) & set(state.free):
        return "the device writes a free page"
    if rules.fence != "strict":
        for i, row in enumerate(state.rows):
            if row.transfer and any(page in row.pages and owner != i for s in state.in_flight for page, owner in s):
                return "the device writes a page that a transfer fills"
    return None


@dataclass(frozen=True, slots=True)
class Finding:
    num_states: int
    violation: str | None
    trace: tuple[Action, ...]
    num_wedged: int  # states from which the pages never all come back


def explore(rules: Rules) -> Finding:
    """Breadth first over every reachable state."""
    parents: dict[State, tuple[State, Action] | None] = {INITIAL: None}
    before: dict[State, list[State]] = {}
    queue = deque([INITIAL])
    while queue:
        state = queue.popleft()
        problem = violation(state, rules)
        if problem is not None:
            return Finding(len(parents), problem, trace_to(parents, state), 0)
        for action, after in successors(state, rules):
            before.setdefault(after, []).append(state)
            if after not in parents:
                parents[after] = (state, action)
                queue.append(after)
    good = {state for state in parents if len(state.free) == PAGES and not state.in_flight}
    queue = deque(good)
    while queue:
        for state in before.get(queue.popleft(), ()):
            if state not in good:
                good.add(state)
                queue.append(state)
    return Finding(len(parents), None, (), len(parents) - len(good))


def trace_to(parents: dict[State, tuple[State, Action] | None], state: State) -> tuple[Action, ...]:
    trace = []
    while (step := parents[state]) is not None:
        state, action = step
        trace.append(action)
    return tuple(reversed(trace))
