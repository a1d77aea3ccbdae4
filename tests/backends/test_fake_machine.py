"""S-8 at the level of plans: whatever a scheduler may do, a request's tokens are those it gets alone.

Hypothesis drives the fake runner through chunks, overlap, several turns, drafts, preemption, shared and copied prefixes
and tenancies that end in flight. A false alarm of the fake's checks would fail here as well as a missed mistake.
"""

from __future__ import annotations

from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from backends.fake import Runner
from engine.step import draft_token
from tests.backends.driver import Driver, Seq, llama

LIMIT = 100  # tokens of a sequence; the model length is 128
V = 64
SAMPLINGS: tuple[dict[str, object], ...] = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 2**40, "repetition": 1.3, "presence": 0.5, "bad_words": ((3, 4), (9,))},
)


@cache
def oracle(prompt: tuple[int, ...], kind: int) -> tuple[Driver, Seq]:
    d = Driver(Runner(), llama(vocab_size=V))
    return d, d.new(prompt, **SAMPLINGS[kind])


def alone(seq: Seq, kind: int, num_outputs: int) -> list[int]:
    """The first outputs of a request that has a runner to itself."""
    d, same = oracle(tuple(seq.tokens[: seq.num_prompt]), kind)
    d.generate([same], num_outputs)
    return same.outputs[:num_outputs]


class Plans(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**16), windowed=st.booleans())
    def start(self, seed: int, windowed: bool) -> None:
        arch = llama(vocab_size=V, windows=(20, None) if windowed else (None, None))
        self.d = Driver(Runner(), arch, seed=seed, max_slots=5, row_buckets=(5,), token_buckets=(8, 256))
        self.kind: dict[Seq, int] = {}
        self.everyone: list[Seq] = []

    def open_seqs(self) -> list[Seq]:
        return [s for s in self.d.live if s.planned + 10 < LIMIT]

    def enrol(self, seq: Seq, kind: int) -> None:
        self.kind[seq] = kind
        self.everyone.append(seq)

    @precondition(lambda self: self.d.free_slots)
    @rule(length=st.sampled_from([1, 15, 16, 17, 33, 40]), kind=st.integers(0, 2), whole=st.booleans())
    def add(self, length: int, kind: int, whole: bool) -> None:
        seq = self.d.new(self.d.prompt(length), **SAMPLINGS[kind])
        self.enrol(seq, kind)
        if whole and len(self.d.in_flight) < 2:
            self.d.submit(self.d.plan([(seq, length)]))

    @precondition(lambda self: len(self.d.in_flight) < 2 and self.open_seqs())
    @rule(data=st.data(), num_steps=st.integers(1, 3))
    def step(self, data: st.DataObject, num_steps: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.open_seqs()), unique_by=id, min_size=1, max_size=4))
        sizes = [data.draw(st.sampled_from(sorted({s.left, min(s.left, 7), 1}))) for s in chosen]
        if any(s.left != 1 for s in chosen):
            num_steps = 1
        self.d.submit(self.d.plan(list(zip(chosen, sizes, strict=True)), num_steps=num_steps))

    def decoding(self) -> list[Seq]:
        return [s for s in self.open_seqs() if s.left == 1 and s.opened and (s.unknown or s.outputs)]

    @precondition(lambda self: len(self.d.in_flight) < 2 and self.decoding())
    @rule(data=st.data(), tree=st.booleans())
    def draft(self, data: st.DataObject, tree: bool) -> None:
        """Drafts that are right, wrong, or the device's own, as a chain or a tree."""
        rows, parents = [], []
        for seq in data.draw(st.lists(st.sampled_from(self.decoding()), unique_by=id, min_size=1, max_size=3)):
            count = data.draw(st.integers(1, 4))
            expected = alone(seq, self.kind[seq], len(seq.outputs) + count)[len(seq.outputs) :]
            parents.append([data.draw(st.integers(-1, i - 1)) for i in range(count)])
            ids = []
            for i in range(count):
                which = data.draw(st.sampled_from(["right", "wrong", "own"]))
                right = expected[i]
                ids.append({"right": right, "wrong": (right + 1) % V, "own": draft_token(i)}[which])
            rows.append((seq, ids))
        self.d.submit(self.d.draft_plan(rows, parents if tree else ()))

    @precondition(lambda self: self.d.in_flight)
    @rule()
    def collect(self) -> None:
        self.d.collect(self.d.in_flight[0])
        for seq in self.everyone:
            assert seq.outputs == alone(seq, self.kind[seq], len(seq.outputs))

    def lone(self) -> list[Seq]:
        """Sequences whose pages nobody borrows."""
        borrowed = {entry for other in self.d.live for entry in other.borrowed}
        return [s for s in self.d.live if not borrowed & {(g, p) for g, own in enumerate(s.pages) for p in own}]

    @precondition(lambda self: self.lone() and self.d.free_slots)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Also in flight: what the old tenancy still samples is nobody's."""
        seq = data.draw(st.sampled_from(self.lone()))
        self.enrol(self.d.preempt(seq), self.kind[seq])

    @precondition(lambda self: len(self.d.live) > 3 and self.lone())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.d.close(data.draw(st.sampled_from(self.lone())))

    def sources(self) -> list[Seq]:
        return [s for s in self.d.live if s.opened and min(s.planned, s.num_prompt) > 1]

    @precondition(lambda self: self.d.free_slots and self.sources() and len(self.d.in_flight) < 2)
    @rule(data=st.data(), kind=st.integers(0, 2))
    def share(self, data: st.DataObject, kind: int) -> None:
        """A new request with the beginning of another's prompt: whole pages by reference, the tail by copy."""
        source = data.draw(st.sampled_from(self.sources()))
        most = min(source.planned, source.num_prompt)
        count = most - data.draw(st.integers(0, most - 1))
        seq = self.d.new([*source.tokens[:count], *self.d.prompt(data.draw(st.integers(1, 9)))], **SAMPLINGS[kind])
        self.enrol(seq, kind)
        copies = self.d.share(seq, source, count)
        self.d.submit(self.d.plan([(seq, 1)], copies=copies))

    def teardown(self) -> None:
        if not hasattr(self, "d"):
            return
        while self.d.in_flight:
            self.collect()
        for seq in self.open_seqs():
            self.d.generate([seq], len(seq.outputs) + 2)
            assert seq.outputs == alone(seq, self.kind[seq], len(seq.outputs))


TestPlans = Plans.TestCase
TestPlans.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
