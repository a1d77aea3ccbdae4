"""The contract rehearsed: every part of a plan that no feature uses yet, driven by hand on the fake runner.

One test for each of: a late mask, k-step decode, tree drafts, two replicas, a partial-page copy, state slots, a cross
group, an asynchronous load, a lost cache. What breaks the contract is in test_violations.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.fake import Runner
from engine.errors import InternalError, StepFailed
from engine.specs.cache import GroupKind, GroupSpec, cache_groups
from engine.step import (
    LAST_TOKEN,
    Bucket,
    CrossEncodes,
    PageDelta,
    Sampler,
    StateSlots,
    StepPlan,
    Transfers,
    draft_token,
    empty_plan,
)
from tests.backends.driver import Driver, llama, ragged

V = 199


def alone(prompt: Sequence[int], num_outputs: int, **sampling: Any) -> list[int]:
    """What a runner that sees only this request gives."""
    d = Driver(Runner())
    return d.generate([d.new(prompt, **sampling)], num_outputs)[0]


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_late_mask() -> None:
    """Forward n + 1 is submitted before the mask of n; sampling waits for its own mask, and only that."""
    d = Driver(Runner())
    masked, free = d.new(d.prompt(9), temperature=1.0, seed=4), d.new(d.prompt(20))
    wanted = alone(free.tokens, 3)
    first = d.submit(d.plan([(masked, 9), (free, 20)], late_mask=True))
    second = d.submit(d.plan([(masked, 1), (free, 1)], late_mask=True))
    with pytest.raises(InternalError, match="waits for its mask"):
        d.runner.collect(first)
    for handle, ids in ((first, (5, 197)), (second, (64,))):
        bits = np.zeros((1, 7), np.uint32)
        for v in ids:
            bits[0, v // 32] |= np.uint32(1 << v % 32)
        d.runner.provide_mask(handle, i32(0), bits)
    assert d.collect(first).tokens[0, 0] in (5, 197)
    assert d.collect(second).tokens[0, 0] == 64
    d.generate([masked, free], 3)
    assert free.outputs == wanted


def test_several_turns_on_the_device() -> None:
    """A step of k turns with a row that stops, planned over by the next step before anybody knows."""
    d = Driver(Runner())
    prompts = [d.prompt(30), d.prompt(15)]
    wanted = [alone(p, 10) for p in prompts]
    stop = wanted[1][2]
    seqs = [d.new(prompts[0]), d.new(prompts[1], stop_ids=(stop,))]
    d.step([(s, s.left) for s in seqs])
    first = d.submit(d.plan([(s, 1) for s in seqs], num_steps=4))
    second = d.submit(d.plan([(s, 1) for s in seqs], num_steps=4))  # num_computed of row 1 is an upper bound
    result = d.collect(first)
    assert result.num_sampled.tolist() == [4, 2] and result.tokens.shape == (2, 4)
    assert seqs[1].outputs == wanted[1][:3]
    d.collect(second)  # what row 1 did behind its stop is dropped by the scheduler
    assert seqs[0].outputs == wanted[0][:9]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tree_drafts(temperature: float) -> None:
    """The longest matching path is accepted, its KV is moved together, and later steps read it."""
    d = Driver(Runner(), max_slots=4)
    prompt = d.prompt(14)  # the tree lies over a page border
    w = alone(prompt, 12, temperature=temperature, seed=6)
    seq, chain = (d.new(prompt, temperature=temperature, seed=6) for _ in range(2))
    d.step([(seq, 14), (chain, 14)])
    wrong = [(t + 1) % V for t in w]
    # the last token has children 0 (wrong) and 1 (right); 1 has 2 (wrong) and 3 (right); 3 has 4 (right); 0 has 5
    ids, parents = [wrong[1], w[1], wrong[2], w[2], w[3], w[2]], [-1, -1, 1, 1, 3, 0]
    result = d.collect(d.submit(d.draft_plan([(seq, ids), (chain, [w[1], wrong[2]])], [parents, [-1, 0]])))
    assert result.num_sampled.tolist() == [4, 2]
    assert result.tokens[0, :4].tolist() == w[1:5] and result.tokens[1, :2].tolist() == w[1:3]
    # what the device drafts itself: for greedy rows the fake's own drafts are right
    mine = [draft_token(0), draft_token(1), draft_token(2)]
    result = d.collect(d.submit(d.draft_plan([(seq, mine), (chain, mine)], [[-1, -1, 0], [-1, 0, 1]])))
    if not temperature:
        assert result.num_sampled.tolist() == [3, 4]
    d.generate([seq, chain], 12)
    assert seq.outputs[:12] == chain.outputs[:12] == w


def test_drafts_under_overlap() -> None:
    """The next step is planned as if every draft were accepted; the device's own lengths decide."""
    d = Driver(Runner())
    prompt = d.prompt(10)
    w = alone(prompt, 10)
    seq = d.new(prompt)
    d.step([(seq, 10)])
    first = d.submit(d.draft_plan([(seq, [w[1], (w[2] + 1) % V, w[3]])]))
    second = d.submit(d.draft_plan([(seq, [draft_token(0), draft_token(1)])]))
    assert d.collect(first).num_sampled.tolist() == [2]
    assert d.collect(second).num_sampled.tolist() == [3]
    assert seq.outputs == w[:6]
    d.generate([seq], 10)
    assert seq.outputs == w


def test_two_replicas() -> None:
    """One submit drives both; slots and pages are replica-local; an idle replica gets a plan without rows."""
    runner = Runner()
    d = Driver(runner, num_replicas=2)
    prompts = [d.prompt(12), d.prompt(5)]
    wanted = [alone(p, 3) for p in prompts]
    seqs = [d.new(p, slot=0) if i == 0 else d.new(p, slot=1) for i, p in enumerate(prompts)]
    plans = [d.plan([(s, s.left)]) for s in seqs]
    step_id, bucket = plans[1].step_id, plans[0].bucket
    bucket = Bucket(tokens=max(p.bucket.tokens for p in plans), rows=bucket.rows)
    # the same slot and the same pages in both replicas
    moved = replace(plans[1], slots=i32(0), bucket=bucket)
    assert moved.opened is not None
    moved = replace(moved, opened=replace(moved.opened, slots=i32(0)), page_deltas=own_pages(i32(0), plans[0]))
    first = runner.submit([replace(plans[0], step_id=step_id, bucket=bucket), moved])
    results = runner.collect(first)
    assert [int(r.tokens[0, 0]) for r in results] == [w[0] for w in wanted]
    idle = empty_plan(step_id + 1, d.bucket(1, 1))
    decode = replace(
        idle, slots=i32(0), generation=moved.generation, num_computed=i32(5), num_new=i32(1), num_logits=i32(1),
        token_ids=i32(LAST_TOKEN), positions=np.array([[5]], np.int32), logit_rows=i32(0), sampler=Sampler.GREEDY,
    )  # fmt: skip
    results = runner.collect(runner.submit([idle, decode]))
    assert results[0].tokens.shape[0] == 0 and int(results[1].tokens[0, 0]) == wanted[1][1]
    with pytest.raises(InternalError, match="2 replicas"):
        runner.submit([empty_plan(step_id + 2, bucket)])


def own_pages(slots: np.ndarray, like: StepPlan) -> tuple[PageDelta | None, ...]:
    """The other plan's pages for one slot."""
    return tuple(None if p is None else PageDelta(slots=slots[[0] * len(p.slots)], columns=p.columns, pages=p.pages)
                 for p in like.page_deltas)  # fmt: skip


def test_partial_page_copy() -> None:
    """The tail of a shared prefix is copied before the step's writes: the source's row goes on in the same step."""
    d = Driver(Runner())
    source = d.new(d.prompt(25))
    d.step([(source, 25)])
    prompt = source.tokens[:24] + d.prompt(3)
    seq = d.new(prompt)
    copies = d.share(seq, source, 24)
    assert copies is not None and copies.tokens.tolist() == [8]
    d.step([(source, 1), (seq, 3)], copies=copies)
    d.generate([source, seq], 4)
    assert seq.outputs == alone(prompt, 4)
    assert source.outputs == alone(source.tokens[:25], 4)


def with_groups(*extra: GroupSpec) -> Driver:
    return Driver(Runner(), groups=(*cache_groups(llama()), *extra))


STATE = GroupSpec(kind=GroupKind.STATE, layers=(0,), num_kv_heads=1, head_size=8)
CROSS = GroupSpec(kind=GroupKind.CROSS, layers=(1,), num_kv_heads=1, head_size=8)


def test_state_slots() -> None:
    """Read one row, write another at a chunk end: the checkpoint serves a second request with the same beginning."""
    d = with_groups(STATE)

    def state(read: int, write: int) -> tuple[StateSlots, ...]:
        return (StateSlots(group=1, read=i32(read), write=i32(write)),)

    prompt = d.prompt(32)
    wanted = alone(prompt, 3)
    a = d.new(prompt)
    d.step([(a, 16)], states=state(-1, 3))  # 3 is the checkpoint of 16 tokens
    d.step([(a, 16)], states=state(3, 4))
    d.step([(a, 1)], states=state(4, 4))
    d.step([(a, 1)], states=state(4, 4))
    assert a.outputs == wanted
    b = d.new(prompt)
    assert d.share(b, a, 16) is None
    d.step([(b, 16)], states=state(3, 5))
    d.step([(b, 1)], states=state(5, 5), num_steps=2)
    assert b.outputs == wanted
    c = d.new(prompt)
    d.share(c, a, 16)
    with pytest.raises(InternalError, match="state rows"):
        d.step([(c, 16)], states=state(4, 6))  # 34 tokens stand there, not 16


def test_cross_group() -> None:
    """An encode fills pages once; rows that read the same media agree, others differ; rewriting is refused."""
    d = with_groups(CROSS)
    pool = d.layout.groups[1].pool
    pages = [d.take_page(pool) for _ in range(4)]

    def encode(media: Sequence[int], own: Sequence[Sequence[int]]) -> CrossEncodes:
        return CrossEncodes(
            group=1,
            media_id=np.array(media, np.int64),
            pages=ragged(own),
            num_tokens=i32(*(16 * len(p) - 3 for p in own)),
        )

    def cross(plan: StepPlan, mine: dict[int, Sequence[int]]) -> StepPlan:
        entries = [(slot, c, page) for slot, own in mine.items() for c, page in enumerate(own)]
        slots, columns, ids = np.array(entries, np.int32).T.copy()
        return replace(plan, page_deltas=(plan.page_deltas[0], PageDelta(slots=slots, columns=columns, pages=ids)))

    prompt = d.prompt(10)
    a, b = d.new(prompt), d.new(prompt)
    plan = cross(d.plan([(a, 10), (b, 10)]), {a.slot: pages[:2], b.slot: pages[2:3]})
    d.collect(d.submit(replace(plan, encodes=encode((7, 8), (pages[:2], pages[2:3])))))
    c = d.new(prompt)
    d.collect(d.submit(cross(d.plan([(c, 10)]), {c.slot: pages[:2]})))  # media 7 again, not encoded again
    d.generate([a, b, c], 4)
    assert a.outputs == c.outputs != b.outputs
    e = d.new(prompt)
    plan = cross(d.plan([(e, 10)]), {e.slot: pages[:2]})
    with pytest.raises(InternalError, match="written again"):
        d.runner.submit([replace(plan, encodes=encode((9,), (pages[:2],)))])


def test_cross_pages_must_have_been_encoded() -> None:
    d = with_groups(CROSS)
    seq = d.new(d.prompt(4))
    plan = d.plan([(seq, 4)])
    delta = PageDelta(slots=i32(seq.slot), columns=i32(0), pages=i32(9))
    with pytest.raises(InternalError, match="no encode wrote"):
        d.runner.submit([replace(plan, page_deltas=(plan.page_deltas[0], delta))])


def transfer(transfer_id: int, kind: int, pages: Sequence[int], source: str) -> Transfers:
    return Transfers(
        transfer_id=np.array([transfer_id], np.int64), kind=np.array([kind], np.uint8), pool=i32(0),
        pages=ragged([pages]), source=(source,),
    )  # fmt: skip


def idle_step(d: Driver, **parts: Any) -> Any:
    plan = replace(empty_plan(d.next_step(), d.bucket(0, 0)), **parts)
    (result,) = d.runner.collect(d.runner.submit([plan]))
    return result


def test_asynchronous_load() -> None:
    """Pages stored by one runner are loaded by another, while it works for somebody else; then a row begins in them."""
    remote: dict[str, Any] = {}
    giver = Driver(Runner(remote))
    prompt = giver.prompt(32)
    source = giver.new(prompt)
    giver.step([(source, 32)])
    result = idle_step(giver, transfers=transfer(1, 1, source.pages[0][:2], "kv-a"))
    assert result.finished_transfers == () and remote == {}
    assert giver.runner.poll() == []
    assert [(e.kind, e.transfer_id) for e in giver.runner.poll()] == [("transfer_finished", 1)]

    d = Driver(Runner(remote, fail_transfers=frozenset({9})), seed=7)
    busy = d.new(d.prompt(5))
    seq = d.new([*prompt, 3, 4])
    seq.pages[0] = [d.take_page(0), d.take_page(0)]
    result = d.step([(busy, 5)], transfers=transfer(5, 0, seq.pages[0], "kv-a"))
    assert result.finished_transfers == ()
    assert d.step([(busy, 1)]).finished_transfers == ()
    assert d.step([(busy, 1)]).finished_transfers == (5,)
    seq.pending = [(0, column, page) for column, page in enumerate(seq.pages[0])]
    seq.planned = 32
    d.step([(seq, 2), (busy, 1)])
    d.generate([seq, busy], 4)
    assert seq.outputs == alone([*prompt, 3, 4], 4)
    # one that fails, and one of which the other side knows nothing
    for transfer_id, name in ((9, "kv-a"), (10, "kv-b")):
        d.step([(busy, 1)], transfers=transfer(transfer_id, 0, [d.take_page(0), d.take_page(0)], name))
        d.step([(busy, 1)])
        assert d.step([(busy, 1)]).failed_transfers == (transfer_id,)


def test_transfers_respect_steps_in_flight() -> None:
    """A page that an uncollected step uses may not be loaded into; a page that is being loaded may not be read."""
    d = Driver(Runner())
    seq = d.new(d.prompt(16))
    handle = d.submit(d.plan([(seq, 16)]))
    plan = empty_plan(d.next_step(), d.bucket(0, 0))
    with pytest.raises(InternalError, match="uncollected step"):
        d.runner.submit([replace(plan, transfers=transfer(1, 0, seq.pages[0], "x"))])
    d = Driver(Runner())
    seq = d.new(d.prompt(16))
    handle = d.submit(d.plan([(seq, 16)]))
    d.collect(handle)
    idle_step(d, transfers=transfer(1, 0, seq.pages[0], "x"))
    with pytest.raises(InternalError, match="never written"):
        d.step([(seq, 1)])


def test_lost_cache() -> None:
    """A step fails and takes the cache with it, the step behind it too; everything is recomputed, nothing differs."""
    failure = StepFailed("injected", rows=(1,), cache_lost=True)
    d = Driver(Runner(fail_at={3: failure}))
    prompts = [d.prompt(20), d.prompt(9)]
    wanted = [alone(p, 6) for p in prompts]
    seqs = [d.new(p) for p in prompts]
    d.step([(s, s.left) for s in seqs])
    d.step([(s, 1) for s in seqs])
    handles = [d.submit(d.plan([(s, 1) for s in seqs])) for _ in range(2)]
    for number, handle in enumerate(handles):
        with pytest.raises(StepFailed) as caught:
            d.runner.collect(handle)
        assert caught.value.cache_lost and caught.value.rows == ((1,) if number == 0 else ())
    d.in_flight.clear()
    again = [d.preempt(s) for s in seqs]
    d.generate(again, 6)
    assert [s.outputs for s in again] == wanted


def test_a_failed_step_without_loss_keeps_the_pages() -> None:
    d = Driver(Runner(fail_at={2: StepFailed("injected", rows=(0,))}))
    kept, victim = d.new(d.prompt(20)), d.new(d.prompt(9))
    wanted = alone(kept.tokens, 3)
    d.step([(kept, 20), (victim, 9)])
    with pytest.raises(StepFailed):
        d.step([(victim, 1)])
    d.generate([kept], 3)
    assert kept.outputs == wanted
    with pytest.raises(InternalError, match="failed step"):
        d.step([(victim, 1)])


def test_eos_control() -> None:
    never = Driver(Runner(eos_probability=0.0), llama(vocab_size=20, eos=(3,)))
    always = Driver(Runner(eos_probability=1.0), llama(vocab_size=20, eos=(3,)))
    assert 3 not in never.generate([never.new([1, 2])], 60)[0]
    assert set(always.generate([always.new([1, 2])], 5)[0]) == {3}


def test_non_finite_rows_and_latency() -> None:

    d = Driver(Runner(latency_s=0.02, non_finite_at={1: (1,)}))
    a, b = d.new(d.prompt(3)), d.new(d.prompt(3))
    begin = time.monotonic()
    assert d.step([(a, 3), (b, 3)]).error.tolist() == [0, 2]
    d.step([(a, 1)])
    assert time.monotonic() - begin >= 0.04


def test_pooling() -> None:
    """A pooled vector is the sequence's own, in any chunks; rows that did not ask have zeros."""
    d = Driver(Runner())
    prompt = d.prompt(20)
    a, b = d.new(prompt), d.new(prompt)
    whole = d.step([(a, 20)], pooling=i32(1)).pooled
    d.step([(b, 11)])
    split = d.step([(b, 9), (a, 1)], pooling=i32(1, 0)).pooled
    assert whole is not None and split is not None
    assert (whole[0] == split[0]).all() and whole[0].any() and not split[1].any()
