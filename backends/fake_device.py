"""One replica of the fake runner: device tables, pages, and the execution of a step.

Used by backends/fake.py alone. `forward` does everything up to the logits, `finish` samples; between them a late mask
may arrive. What a real device would silently get wrong (a null page, a stale slot, a foreign page) is an InternalError.

Always true: a row's output depends on its own tokens, sampling table, media and the model seed, and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backends.fake_model import FakeOptions, HashModel, pick_logprobs
from backends.fake_pages import PagePool, mix64, token_digest
from backends.fake_sampling import SamplerTables
from engine.errors import check
from engine.runner import RunnerConfig
from engine.specs.cache import CacheLayout, GroupKind
from engine.step import (
    F32,
    I32,
    I64,
    LAST_TOKEN,
    NULL_PAGE,
    U64,
    Drafts,
    Logprobs,
    OpenedRows,
    RowError,
    Sampler,
    StateSlots,
    StepPlan,
    StepResult,
    draft_token,
    query_starts,
)

Bool = npt.NDArray[np.bool_]

CLOSED = -1


@dataclass(slots=True)
class Forward:
    """A step between its forward pass and its sampling."""

    plan: StepPlan
    start: I32  # [S] tokens before this step, the device's truth
    tokens: I32  # [T] resolved and clamped
    digest: U64  # [T]
    salt: U64  # [S] what a row reads besides its tokens: media
    error: npt.NDArray[np.uint8]  # [S]
    prompt_logprobs: Logprobs | None = None
    pooled: F32 | None = None


class Device:
    """Tables, pools and execution of one replica."""

    def __init__(self, config: RunnerConfig, layout: CacheLayout, options: FakeOptions) -> None:
        self.config, self.layout, self.options = config, layout, options
        self.vocab_size = config.arch.vocab_size
        self.model = HashModel(config.arch, config.seed, options.eos_probability)
        n = config.max_slots
        self.pools = [PagePool(p.num_pages, p.page_tokens) for p in layout.pools]
        columns = [-(-config.max_model_len // g.page_tokens) for g in layout.groups]
        self.tables = [np.zeros((n, c), np.int32) for c in columns]
        self.generation = np.full(n, CLOSED, np.int64)
        self.length = np.zeros(n, np.int32)
        self.last_token = np.full(n, -1, np.int32)  # -1 = none in this tenancy
        self.chain = np.zeros(n, np.uint64)  # digest of tokens [0, length)
        self.sampling = SamplerTables(n, self.vocab_size)
        states = [g.pool for g in layout.groups if g.spec.kind is GroupKind.STATE]
        self.state_digest = {p: np.zeros(layout.pools[p].num_pages, np.uint64) for p in states}
        self.state_length = {p: np.full(layout.pools[p].num_pages, -1, np.int32) for p in states}
        self.broken: set[int] = set()  # slots of a failed step: unusable until they are opened again

    # tables

    def apply_tables(self, plan: StepPlan) -> None:
        """closed, opened, page deltas: in this order, before anything else of the step."""
        if plan.closed is not None:
            for slot in plan.closed.tolist():
                check(self.generation[slot] != CLOSED, f"step {plan.step_id} closes slot {slot}, which is not open")
            self.generation[plan.closed] = CLOSED
        if plan.opened is not None:
            self.open(plan.opened)
        for group, delta in enumerate(plan.page_deltas):
            if delta is None:
                continue
            table, pool = self.tables[group], self.layout.groups[group].pool
            check((self.generation[delta.slots] != CLOSED).all(), f"page delta of group {group} for a closed slot")
            check((delta.columns >= 0).all() and (delta.columns < table.shape[1]).all(), "page delta beyond the table")
            self.pools[pool].check_ids(delta.pages[delta.pages != NULL_PAGE], f"page delta of group {group}")
            table[delta.slots, delta.columns] = delta.pages

    def open(self, opened: OpenedRows) -> None:
        slots = opened.slots
        check(len(np.unique(slots)) == len(slots), f"a slot is opened twice: {slots.tolist()}")
        same = self.generation[slots] == opened.generation
        check(not same.any(), f"slots {slots[same].tolist()} are opened with the generation they already have")
        self.generation[slots], self.length[slots] = opened.generation, opened.num_computed
        self.last_token[slots], self.chain[slots] = -1, 0
        for table in self.tables:
            table[slots] = NULL_PAGE
        self.sampling.open(opened)
        self.broken.difference_update(slots.tolist())

    # forward

    def forward(self, plan: StepPlan, slack: I32 | None) -> Forward:
        """Everything up to the logits. slack: i32 [max_slots], see check_bounds."""
        slots = plan.slots
        self.check_tenants(plan)
        if plan.copies is not None:
            for pool in np.unique(plan.copies.pool).tolist():
                mine = plan.copies.pool == pool
                copies = plan.copies
                self.pools[pool].copy(copies.source[mine], copies.target[mine], copies.tokens[mine])
        salt = self.read_media(plan)
        start = self.length[slots]
        self.check_bounds(plan, start, slack)
        context = self.read(slots, start)
        self.read_states(plan)
        starts = query_starts(plan)
        row_of = np.repeat(np.arange(len(slots)), plan.num_new)  # [T]
        offset: I32 = np.repeat(start - starts[:-1], plan.num_new)
        places: I32 = np.add(offset, np.arange(plan.num_tokens), dtype=np.int32)
        error = np.zeros(len(slots), np.uint8)
        tokens = self.resolve_tokens(plan, row_of, error)
        digest = token_digest(tokens, places).cumsum(dtype=np.uint64)
        before = np.append(np.zeros(1, np.uint64), digest)[starts[:-1]]
        digest += (context - before)[row_of]
        parents = np.append(np.zeros(1, np.uint64), digest[:-1])
        parents[starts[:-1][plan.num_new > 0]] = context[plan.num_new > 0]
        step = Forward(plan, start, tokens, digest, salt, error)
        if plan.drafts is not None:
            self.grow_trees(step, plan.drafts, parents)
        self.check_positions(plan, start, places, row_of)
        self.write(slots[row_of], places, tokens, digest, parents)
        self.length[slots] += plan.num_new
        if len(slots):
            self.chain[slots] = digest[starts[1:] - 1]
        self.write_states(plan.states, slots)
        step.prompt_logprobs = self.score_prompt(step, row_of)
        if plan.pooling is not None:
            step.pooled = self.model.pooled(self.model.hash(self.chain[slots], salt))
            step.pooled[plan.pooling == 0] = 0
        return step

    def check_tenants(self, plan: StepPlan) -> None:
        wrong = self.generation[plan.slots] != plan.generation
        if wrong.any():
            slot = int(plan.slots[wrong][0])
            has = self.generation[slot]
            state = "not open" if has == CLOSED else f"of generation {has}"
            check(False, f"step {plan.step_id} uses slot {slot}, generation {plan.generation[wrong][0]}: it is {state}")
        broken = self.broken.intersection(plan.slots.tolist())
        check(not broken, f"step {plan.step_id} uses slots {sorted(broken)} of a failed step without opening them")

    def check_bounds(self, plan: StepPlan, start: I32, slack: I32 | None) -> None:
        """num_computed is an upper bound of length[slot], off by no more than what the host could not know.

        slack[slot]: tokens that steps not yet collected when this one was submitted could have added and did not.
        """
        gap = plan.num_computed - start
        allowed = 0 if slack is None else slack[plan.slots]
        bad = (gap < 0) | (gap > allowed)
        if bad.any():
            r = int(np.flatnonzero(bad)[0])
            given, real = plan.num_computed[r], start[r]
            check(False, f"step {plan.step_id} row {r}: num_computed {given}, but slot {plan.slots[r]} holds {real}")

    def check_positions(self, plan: StepPlan, start: I32, places: I32, row_of: I64) -> None:
        """Positions are the host's: shifted by what the device knows better. Tree drafts hold depths instead."""
        given = plan.positions[0] - (plan.num_computed - start)[row_of]
        chain = np.ones(plan.num_rows, np.bool_)
        if plan.drafts is not None and plan.drafts.parents is not None:
            chain = plan.drafts.num_drafts == 0
        wrong = (given != places) & chain[row_of]
        if wrong.any():
            t = int(np.flatnonzero(wrong)[0])
            check(False, f"step {plan.step_id} token {t}: position {plan.positions[0, t]}, expected {places[t]}")

    def read(self, slots: I32, stop: I32) -> U64:
        """Digest of tokens [0, stop) of each row, read through the page tables of every group. -> u64 [n]."""
        known, found = self.chain[slots], None
        fresh = (known == 0) & (stop > 0)  # opened with tokens already computed: the pages tell
        for group, table in zip(self.layout.groups, self.tables, strict=True):
            if group.spec.kind in (GroupKind.CROSS, GroupKind.STATE):
                continue
            start = np.zeros_like(stop)
            if group.spec.kind is GroupKind.WINDOW and group.spec.window is not None:
                # the first query stands at `stop` and sees (stop - window, stop]; one more is read for its context
                start = np.maximum(0, np.minimum(stop - 1, stop - group.spec.window + 1))
            digest = self.pools[group.pool].read(table[slots], start, stop)
            expected = np.where(fresh, digest, known) if found is None else found
            wrong = digest != expected
            if wrong.any():
                r = int(np.flatnonzero(wrong)[0])
                check(False, f"slot {slots[r]}: the pages do not hold the {stop[r]} tokens that this row computed")
            found = digest
        if found is None:
            return known
        self.chain[slots] = found
        return found

    def resolve_tokens(self, plan: StepPlan, row_of: I64, error: npt.NDArray[np.uint8]) -> I32:
        """Token ids [T] with the device's own tokens filled in; drafts of the device are left negative."""
        given, tokens = plan.token_ids, plan.token_ids.copy()
        own = given == LAST_TOKEN
        if own.any():
            last = self.last_token[plan.slots[row_of[own]]]
            if (last < 0).any():
                slot = plan.slots[row_of[own]][last < 0][0]
                check(False, f"step {plan.step_id} wants the last token of slot {slot}, which has sampled none")
            tokens[own] = last
        allowed = np.zeros(len(given), np.int32)
        if plan.drafts is not None:
            allowed = plan.drafts.num_drafts[row_of]
        bad = (tokens >= self.vocab_size) | ((tokens < 0) & (tokens < draft_token(0) - allowed + 1))
        if bad.any():
            error[row_of[bad]] = RowError.BAD_TOKEN_ID
            tokens[bad] = np.clip(tokens[bad], 0, self.vocab_size - 1)
        return tokens

    def write(self, slots: I32, places: I32, tokens: I32, digest: U64, context: U64) -> None:
        """Write one token each into the pages of every group. All arrays [T]; slots and places name where."""
        tenancy = slots.astype(np.int64) << 32 | self.generation[slots]
        for group, table in zip(self.layout.groups, self.tables, strict=True):
            if group.spec.kind in (GroupKind.CROSS, GroupKind.STATE):
                continue
            columns = places // group.page_tokens
            check(not len(columns) or columns.max() < table.shape[1], "a row writes beyond its page table")
            self.pools[group.pool].write(table[slots, columns], places, tokens, digest, context, tenancy)

    # drafts

    def grow_trees(self, step: Forward, drafts: Drafts, context: U64) -> None:
        """Digests along the draft tree, in place; the device's own drafts (negative tokens) are made here."""
        plan, tokens, digest, start = step.plan, step.tokens, step.digest, step.start
        starts = query_starts(plan)
        for r in np.flatnonzero(drafts.num_drafts > 0).tolist():
            first, d = int(starts[r]), int(drafts.num_drafts[r])
            parents = chain_parents(d) if drafts.parents is None else drafts.parents[r, :d].tolist()
            depth = [0] * (d + 1)
            for i, parent in enumerate(parents):
                check(-1 <= parent < i, f"step {plan.step_id} row {r}: draft {i} follows draft {parent}")
                node, above = first + 1 + i, first + 1 + parent
                depth[i + 1] = depth[parent + 1] + 1
                place = plan.positions[0, node] - (plan.num_computed[r] - start[r])
                expected = start[r] + depth[i + 1]
                check(place == expected, f"step {plan.step_id} row {r}: draft {i} at position {place}, not {expected}")
                if tokens[node] < 0:
                    rank = parents[:i].count(parent)
                    tokens[node] = (
                        self.model.peak(self.model.hash(digest[[above]], step.salt[[r]]))[0] + rank
                    ) % self.vocab_size
                context[node] = digest[above]
                own = token_digest(tokens[node : node + 1], np.array([expected], np.int32))
                digest[[node]] = digest[[above]] + own

    def accept(self, step: Forward, mask: Bool | None) -> tuple[I32, I32, I32, U64]:
        """Walk the draft trees: sample at a node, go on at the child that was sampled.

        -> num_sampled [S], tokens [S, 1 + max drafts], nodes [S, same] (token index whose logits were used), hashes.
        """
        plan, drafts = step.plan, step.plan.drafts
        check(drafts is not None, "accept without drafts")
        num_drafts = drafts.num_drafts if drafts is not None else np.zeros(0, np.int32)
        parents_of = None if drafts is None else drafts.parents
        starts = query_starts(plan)
        width = 1 + int(num_drafts.max(initial=0))
        tokens, nodes = np.zeros((plan.num_rows, width), np.int32), np.zeros((plan.num_rows, width), np.int32)
        count = np.zeros(plan.num_rows, np.int32)
        # rows without drafts start at their last token, rows with drafts at the token before the first draft
        node = starts[1:] - 1 - num_drafts
        live = np.flatnonzero(plan.num_logits > 0)
        for turn in range(width):
            hashes = self.model.hash(step.digest[node[live]], step.salt[live])
            sampled = self.sample(plan.sampler, hashes, plan.slots[live], None if mask is None else mask[live])
            self.sampling.append(plan.slots[live], sampled)
            self.last_token[plan.slots[live]] = sampled
            tokens[live, turn], nodes[live, turn] = sampled, node[live]
            count[live] += 1
            going = []
            for r, token in zip(live.tolist(), sampled.tolist(), strict=True):
                first, d = int(starts[r]), int(num_drafts[r])
                parents = chain_parents(d) if parents_of is None else parents_of[r, :d].tolist()
                me = int(node[r]) - first - 1
                child = [i for i in range(d) if parents[i] == me and step.tokens[first + 1 + i] == token]
                if child:
                    node[r] = first + 1 + child[0]
                    going.append(r)
            live = np.array(going, np.int64)
            if not len(live):
                break
        self.keep_accepted(step, num_drafts, count, nodes)
        return count, tokens, nodes, step.digest

    def keep_accepted(self, step: Forward, num_drafts: I32, count: I32, nodes: I32) -> None:
        """Move the KV of the accepted path together and forget the rest."""
        plan = step.plan
        for r in np.flatnonzero(num_drafts > 0).tolist():
            slot, start, kept = plan.slots[r], int(step.start[r]), int(count[r])
            path = nodes[r, :kept]
            places = np.arange(start, start + kept, dtype=np.int32)
            before = step.digest[path[:1]] - token_digest(step.tokens[path[:1]], places[:1])
            context = np.concatenate([before, step.digest[path[:-1]]])
            self.write(np.full(kept, slot), places, step.tokens[path], step.digest[path], context)
            for group, table in zip(self.layout.groups, self.tables, strict=True):
                if group.spec.kind not in (GroupKind.CROSS, GroupKind.STATE):
                    page, pool = group.page_tokens, self.pools[group.pool]
                    behind = np.arange((start + kept - 1) // page + 1, (start + int(num_drafts[r])) // page + 1)
                    pool.fill[table[slot, behind]] = 0
            self.length[slot], self.chain[slot] = start + kept, step.digest[path[-1]]

    # state and media

    def write_states(self, states: tuple[StateSlots, ...] | None, slots: I32) -> None:
        """Recurrent state after this step's tokens."""
        given = {s.group for s in states or ()}
        wanted = {i for i, g in enumerate(self.layout.groups) if g.spec.kind is GroupKind.STATE}
        check(given == wanted or not len(slots), f"states of groups {sorted(given)}, the layout has {sorted(wanted)}")
        for state in states or ():
            pool = self.layout.groups[state.group].pool
            check(len(np.unique(state.write)) == len(state.write), "two rows write one state")
            self.pools[pool].check_ids(state.write, "state write")
            self.state_digest[pool][state.write] = self.chain[slots]
            self.state_length[pool][state.write] = self.length[slots]

    def read_states(self, plan: StepPlan) -> None:
        """A state that is read holds exactly the row's tokens before this step; -1 starts from nothing."""
        for state in plan.states or ():
            pool = self.layout.groups[state.group].pool
            used = state.read >= 0
            check((self.length[plan.slots[~used]] == 0).all(), "a row with computed tokens starts its state from zeros")
            read, slots = state.read[used], plan.slots[used]
            self.pools[pool].check_ids(read, "state read")
            wrong = (self.state_length[pool][read] != self.length[slots]) | (
                self.state_digest[pool][read] != self.chain[slots]
            )
            check(not wrong.any(), f"state rows {read[wrong].tolist()} do not hold the tokens of their rows")

    def read_media(self, plan: StepPlan) -> U64:
        """Run the plan's encodes, then give each row the hash of the media that its cross pages hold. -> u64 [S]."""
        salt = np.zeros(plan.num_rows, np.uint64)
        if plan.encodes is not None:
            self.encode(plan)
        for group, table in zip(self.layout.groups, self.tables, strict=True):
            if group.spec.kind is not GroupKind.CROSS:
                continue
            pool, pages = self.pools[group.pool], table[plan.slots]
            used = pages != NULL_PAGE
            check((pool.fill[pages[used]] > 0).all(), "a row reads a cross page that no encode wrote")
            order = np.arange(pages.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            digest = mix64(pool.digest[pages, 0] + pool.fill[pages].astype(np.uint64))
            salt += np.where(used, digest * order, np.uint64(0)).sum(axis=1, dtype=np.uint64)
        return salt

    def encode(self, plan: StepPlan) -> None:
        """Fill cross pages with the encoder outputs. A page that a row already reads is never written again."""
        encodes = plan.encodes
        if encodes is None:
            return
        group = self.layout.groups[encodes.group]
        check(group.spec.kind is GroupKind.CROSS, f"encodes into group {encodes.group}, which is {group.spec.kind}")
        pool, table = self.pools[group.pool], self.tables[encodes.group]
        named = table[np.flatnonzero(self.generation != CLOSED)]
        for i, (media, count) in enumerate(zip(encodes.media_id.tolist(), encodes.num_tokens.tolist(), strict=True)):
            pages = encodes.pages.values[encodes.pages.starts[i] : encodes.pages.starts[i + 1]]
            pool.check_ids(pages, "encode")
            check(len(pages) == -(-count // pool.page_tokens), f"{count} encoder tokens into {len(pages)} pages")
            busy = np.isin(pages, named) & (pool.fill[pages] > 0)
            check(not busy.any(), f"cross pages {pages[busy].tolist()} are written again while rows read them")
            places = np.arange(count, dtype=np.int32)
            digest = token_digest(np.full(count, media % 2**31, np.int32), places)
            who = np.full(count, -2 - i, np.int64)
            pool.write(pages[places // pool.page_tokens], places, np.zeros(count, np.int32), digest, digest, who)

    # logits and sampling

    def sample(self, sampler: Sampler, hashes: U64, slots: I32, mask: Bool | None) -> I32:
        """Token ids [n]. Rows whose answer is the plain argmax do not pay for their logits."""
        tokens = self.model.peak(hashes)
        greedy = self.sampling.greedy[slots]
        if sampler is Sampler.GREEDY:
            check(greedy.all(), f"slots {slots[~greedy].tolist()} need the full sampler, the plan says greedy")
        rest = np.flatnonzero(~greedy) if mask is None else np.flatnonzero(~greedy | ~mask.all(axis=1))
        if len(rest):
            chosen = None if mask is None else mask[rest]
            tokens[rest] = self.sampling.sample(self.model.logits(hashes[rest]), slots[rest], chosen)
        return tokens

    def score_prompt(self, step: Forward, row_of: I64) -> Logprobs | None:
        wanted = step.plan.prompt_logprobs
        if wanted is None:
            return None
        rows = row_of[wanted.token_idx]
        bad = (wanted.targets < 0) | (wanted.targets >= self.vocab_size)
        step.error[rows[bad]] = RowError.BAD_TOKEN_ID
        targets = np.clip(wanted.targets, 0, self.vocab_size - 1)
        logits = self.model.logits(self.model.hash(step.digest[wanted.token_idx], step.salt[rows]))
        return pick_logprobs(logits, targets, wanted.num_top)

    def finish(self, step: Forward, mask: Bool | None) -> StepResult:
        """Sample. mask: bool [S, V] of a late mask, all true where a row is free."""
        plan = step.plan
        if plan.drafts is not None:
            count, tokens, nodes, digest = self.accept(step, mask)
            hashes = self.model.hash(digest[nodes], step.salt[:, None])
        else:
            count, tokens, hashes = self.take_turns(step, mask)
        step.error[(plan.num_logits > 0) & self.sampling.poisoned[plan.slots]] = RowError.BAD_TOKEN_ID
        for r in self.options.non_finite_at.get(plan.step_id, ()):
            step.error[r] = RowError.NON_FINITE
        return StepResult(
            step_id=plan.step_id,
            num_sampled=count,
            tokens=tokens,
            error=step.error,
            logprobs=self.logprobs_of(plan, count, tokens, hashes),
            prompt_logprobs=step.prompt_logprobs,
            pooled=step.pooled,
        )

    def take_turns(self, step: Forward, mask: Bool | None) -> tuple[I32, I32, U64]:
        """num_steps turns: -> num_sampled [S], tokens [S, num_steps], hashes [S, num_steps]."""
        plan = step.plan
        tokens = np.zeros((plan.num_rows, plan.num_steps), np.int32)
        hashes = np.zeros((plan.num_rows, plan.num_steps), np.uint64)
        count = np.zeros(plan.num_rows, np.int32)
        live = np.flatnonzero(plan.num_logits > 0)
        for turn in range(plan.num_steps):
            slots = plan.slots[live]
            if turn:
                self.decode(plan, live, slots)
            hashes[live, turn] = self.model.hash(self.chain[slots], step.salt[live])
            sampled = self.sample(plan.sampler, hashes[live, turn], slots, None if mask is None else mask[live])
            self.sampling.append(slots, sampled)
            self.last_token[slots] = sampled
            tokens[live, turn] = sampled
            count[live] += 1
            if plan.num_steps > 1:
                live = live[~self.sampling.stopped(slots, sampled)]
        return count, tokens, hashes

    def decode(self, plan: StepPlan, rows: I64, slots: I32) -> None:
        """A further turn on the device: the token sampled last, one more each."""
        start, tokens = self.length[slots], self.last_token[slots]
        context = self.read(slots, start)
        digest = context + token_digest(tokens, start)
        self.write(slots, start, tokens, digest, context)
        self.length[slots] += 1
        self.chain[slots] = digest
        if plan.states is not None:
            again = tuple(StateSlots(group=s.group, read=s.write[rows], write=s.write[rows]) for s in plan.states)
            self.write_states(again, slots)

    def logprobs_of(self, plan: StepPlan, count: I32, tokens: I32, hashes: U64) -> Logprobs | None:
        """Logprobs of the sampled tokens, n = S * max_new; what was not sampled is 0, rank 0, ids -1."""
        if plan.num_logprobs < 0:
            return None
        result = pick_logprobs(self.model.logits(hashes.reshape(-1)), tokens.reshape(-1), plan.num_logprobs)
        empty = (np.arange(tokens.shape[1]) >= count[:, None]).reshape(-1)
        result.chosen[empty], result.rank[empty] = 0, 0
        result.top_ids[empty], result.top[empty] = -1, 0
        return result


def chain_parents(d: int) -> list[int]:
    return list(range(-1, d - 1))
