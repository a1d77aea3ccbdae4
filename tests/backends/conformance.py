"""One suite for every runner: what docs/contract.md promises, asked of a tiny Llama with dummy weights in float32.

`test_conformance_{fake,jax,torch}.py` inherit `Conformance` and say how a runner is made. Most tests share one runner
(`d`); none may depend on what an earlier test left in slots or pages, which is part of what is tested.
Everything is compared between two ways of computing the same thing, so no expected token is written down.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from engine.errors import TwinferError
from engine.runner import Capability, DeviceInfo
from engine.step import (
    Sampler,
    StepPlan,
    empty_plan,
)
from tests.backends.conformance_features import FeatureConformance
from tests.backends.conformance_fixtures import OUTPUTS, PROMPTS
from tests.backends.conformance_sampling import SamplingConformance
from tests.backends.driver import Driver, Seq


def scribble(part: object) -> None:
    """Overwrite every array of a plan."""
    if isinstance(part, np.ndarray):
        part.fill(77)
    elif is_dataclass(part):
        for f in fields(part):
            scribble(getattr(part, f.name))
    elif isinstance(part, tuple):
        for item in part:
            scribble(item)


class Conformance(SamplingConformance, FeatureConformance):
    """Inherit and define make_runner."""

    # lifecycle

    def test_describe_needs_nothing(self) -> None:
        runner = self.make_runner()
        info = runner.describe()
        assert isinstance(info, DeviceInfo)
        again = runner.describe()
        assert replace(info, free_bytes=again.free_bytes) == again  # of a CPU others use the memory too
        assert info.max_in_flight >= 1 and info.page_tokens % 16 == 0 and info.memory_bytes > 0
        assert info.default_dtype in info.supported_dtypes and "float32" in info.supported_dtypes
        assert info.bucket_style in ("pow2", "exact") and info.kind in ("cpu", "gpu", "tpu", "fake")
        assert (Capability.DRAFT_TREE not in info.capabilities) or Capability.DRAFTS in info.capabilities

    def test_life_and_first_step(self, d: Driver) -> None:
        assert d.budget_bytes > 0
        assert d.generate([d.new(d.prompt(3))], 2)[0]

    def test_poll_of_an_idle_runner(self, d: Driver) -> None:
        assert d.runner.poll() == []

    # shapes of steps and results

    def test_step_without_rows(self, d: Driver) -> None:
        plan = empty_plan(d.next_step(), d.bucket(0, 0))
        d.rows_of[plan.step_id] = []
        result = d.collect(d.submit(plan))
        assert result.step_id == plan.step_id
        assert result.num_sampled.shape == (0,) and result.tokens.shape[0] == 0 and result.error.shape == (0,)

    def test_rows_that_do_not_sample(self, d: Driver) -> None:
        a, b = d.new(d.prompt(20)), d.new(d.prompt(9))
        result = d.step([(a, 8), (b, 9)])
        assert result.num_sampled.tolist() == [0, 1]
        assert result.tokens.shape == (2, 1) and 0 <= result.tokens[1, 0] < d.arch.vocab_size
        result = d.step([(a, 8)])
        assert result.num_sampled.tolist() == [0]
        assert d.step([(b, 1), (a, 4)]).num_sampled.tolist() == [1, 1]

    def test_result_types(self, d: Driver) -> None:
        a, b = d.new(d.prompt(4), num_logprobs=3), d.new(d.prompt(7))
        result = d.step([(a, 4), (b, 7)])
        assert result.num_sampled.dtype == np.int32 and result.tokens.dtype == np.int32
        assert result.error.dtype == np.uint8 and result.error.tolist() == [0, 0]
        logprobs = result.logprobs
        assert logprobs is not None and logprobs.chosen.shape == logprobs.rank.shape == (2,)
        assert logprobs.top_ids.shape == logprobs.top.shape == (2, 3)
        assert result.prompt_logprobs is None and result.pooled is None
        assert result.finished_transfers == () and result.failed_transfers == ()
        assert d.step([(b, 1)]).logprobs is None

    def test_order_and_depth(self, d: Driver) -> None:
        """Too many steps in flight, collecting out of order or twice, a mask that nobody waits for: all refused."""
        seq = d.new(d.prompt(4))
        handles = [d.submit(d.plan([(seq, 4 if n == 0 else 1)])) for n in range(d.config.max_in_flight)]
        with pytest.raises(TwinferError):
            d.runner.submit([empty_plan(d.next_step(), d.bucket(0, 0))])
        if len(handles) > 1:
            with pytest.raises(TwinferError):
                d.runner.collect(handles[1])
        with pytest.raises(TwinferError):
            d.runner.provide_mask(handles[0], np.zeros(0, np.int32), np.zeros((0, 7), np.uint32))
        for handle in handles:
            d.collect(handle)
        with pytest.raises(TwinferError):
            d.runner.collect(handles[0])
        d.generate([seq], 4)
        assert seq.outputs == self.alone(d, seq.tokens[:4], 4).outputs

    def test_up_to_the_model_length(self, d: Driver) -> None:
        """The last token of the longest sequence: the last column of the page table, the last position."""
        prompt = d.prompt(d.config.max_model_len - 4)
        wanted = self.alone(d, prompt, 5)  # the fifth is sampled from a full sequence
        seq = d.new(prompt, num_logprobs=0)
        d.generate([seq], 5, chunk=37)
        assert len(seq.tokens) == d.config.max_model_len + 1
        self.same(seq, wanted)

    def test_opened_before_its_first_row(self, d: Driver) -> None:
        """A tenancy may begin in a step that computes nothing of it."""
        prompt = d.prompt(9)
        wanted = self.alone(d, prompt)
        seq = d.new(prompt, num_logprobs=0)
        plan = d.plan([(seq, 9)])
        begin = replace(
            empty_plan(d.next_step(), plan.bucket), opened=plan.opened, page_deltas=plan.page_deltas, closed=plan.closed
        )
        d.runner.collect(d.runner.submit([begin]))
        later = replace(plan, step_id=d.next_step(), opened=None, page_deltas=(), closed=None)
        d.rows_of[later.step_id] = d.rows_of.pop(plan.step_id)
        d.collect(d.submit(later))
        d.generate([seq], OUTPUTS)
        self.same(seq, wanted)

    # one sequence, many ways

    def ways(self, d: Driver) -> None:
        """Chunks, strangers, slots and pages change nothing."""
        prompts = [d.prompt(n) for n in PROMPTS]
        wanted = [self.alone(d, p) for p in prompts]
        assert len({tuple(w.outputs) for w in wanted}) > 1
        together = [d.new(p, num_logprobs=0) for p in prompts]
        d.generate(together, OUTPUTS, chunk=64)
        for seq, want in zip(together, wanted, strict=True):
            self.same(seq, want)
            d.close(seq)
        rng = random.Random(5)
        chunked = [d.new(p, num_logprobs=0) for p in prompts]
        while todo := [s for s in chunked if len(s.outputs) < OUTPUTS]:
            some = rng.sample(todo, rng.randint(1, len(todo)))
            d.step([(s, rng.randint(1, min(s.left, 12))) for s in some])
        for seq, want in zip(chunked, wanted, strict=True):
            self.same(seq, want)
            d.close(seq)

    def test_chunks_strangers_slots_and_pages(self, d: Driver) -> None:
        self.ways(d)

    def test_chunks_strangers_slots_and_pages_with_a_window(self, windowed: Driver) -> None:
        self.ways(windowed)

    def test_pages_behind_a_window_may_be_given_away(self, windowed: Driver) -> None:
        d = windowed
        prompt, other = d.prompt(50), d.prompt(30)
        wanted, wanted_other = self.alone(d, prompt, 12), self.alone(d, other)
        seq = d.new(prompt, num_logprobs=0)
        d.generate([seq], 3, chunk=64)
        group = next(i for i, g in enumerate(d.layout.groups) if g.spec.window is not None)
        pool = d.layout.groups[group].pool
        behind = seq.pages[group][:2]  # tokens [0, 32) of 52; the window is 20
        seq.borrowed |= {(group, page) for page in behind}
        # the stranger's 30 tokens need two pages in each group of this pool: leave exactly these
        groups = sum(g.pool == pool for g in d.layout.groups)
        others = d.free_pages[pool]
        d.free_pages[pool] = behind + [others.pop() for _ in range(2 * groups - len(behind))]
        stranger = d.new(other, num_logprobs=0)
        d.step([(stranger, 30)])
        assert set(behind) <= {page for pages in stranger.pages for page in pages} and not d.free_pages[pool]
        d.free_pages[pool] = others
        d.generate([seq, stranger], 6, chunk=64)
        d.generate([seq], 12)
        self.same(seq, wanted)
        assert stranger.outputs == wanted_other.outputs

    def test_preempted_and_resumed(self, d: Driver) -> None:
        prompt = d.prompt(21)
        for sampling in ({}, {"temperature": 0.9, "seed": 11, "repetition": 1.3, "frequency": 0.4}):
            wanted = self.alone(d, prompt, 8, **sampling)
            seq = d.new(prompt, **sampling)
            d.generate([seq], 3)
            again = d.preempt(seq)
            d.generate([again], 8, chunk=10)
            assert again.outputs == wanted.outputs
            d.close(again)

    # overlap and buffers

    def overlapped(
        self, d: Driver, prompts: Sequence[Sequence[int]], spoil: bool = False, **sampling: object
    ) -> list[Seq]:
        """Two steps in flight all the time; tokens feed the next step on the device."""
        seqs = [d.new(p, num_logprobs=0, **sampling) for p in prompts]
        flying: list[tuple[StepPlan, object]] = []
        for turn in range(OUTPUTS):
            plan = d.plan([(s, s.left if turn == 0 else 1) for s in seqs])
            flying.append((plan, d.submit(plan)))
            if len(flying) == d.config.max_in_flight:
                self.land(d, flying, spoil)
        while flying:
            self.land(d, flying, spoil)
        return seqs

    def land(self, d: Driver, flying: list[tuple[StepPlan, object]], spoil: bool) -> None:
        plan, handle = flying.pop(0)
        d.collect(handle)
        if spoil:
            scribble(plan)

    @pytest.mark.parametrize("spoil", [False, True], ids=["kept", "scribbled"])
    def test_overlap(self, d: Driver, spoil: bool) -> None:
        """LAST_TOKEN before the host knows it; a plan's arrays are anybody's once it is collected."""
        prompts = [d.prompt(n) for n in (9, 20, 3)]
        wanted = [self.alone(d, p) for p in prompts]
        for got, want in zip(self.overlapped(d, prompts, spoil), wanted, strict=True):
            self.same(got, want)

    def test_overlap_with_full_sampling(self, d: Driver) -> None:
        prompts = [d.prompt(n) for n in (9, 20)]
        sampling = {"temperature": 1.0, "seed": 3, "presence": 0.7, "top_k": 40, "bias": {7: 1.5}}
        wanted = [self.alone(d, p, **sampling) for p in prompts]
        for got, want in zip(self.overlapped(d, prompts, spoil=True, **sampling), wanted, strict=True):
            self.same(got, want)

    def test_results_do_not_change_after_later_steps(self, d: Driver) -> None:
        seq = d.new(d.prompt(5), num_logprobs=2)
        first = d.step([(seq, 5)])
        assert first.logprobs is not None
        kept = first.tokens.copy(), first.logprobs.chosen.copy(), first.logprobs.top_ids.copy()
        d.generate([seq], 5)
        assert (first.tokens == kept[0]).all() and (first.logprobs.chosen == kept[1]).all()
        assert (first.logprobs.top_ids == kept[2]).all()

    # pages

    @pytest.mark.parametrize("shared_tokens", [16, 24, 31])
    def test_shared_and_copied_pages(self, d: Driver, shared_tokens: int) -> None:
        """Whole pages by reference, the tail by copy; the source may go on writing behind it, even in that step."""
        source = d.new(d.prompt(shared_tokens + 2), num_logprobs=0)
        d.step([(source, shared_tokens + 2)])
        prompt = source.tokens[:shared_tokens] + d.prompt(6)
        wanted, wanted_source = self.alone(d, prompt), self.alone(d, source.tokens[: shared_tokens + 2])
        seq = d.new(prompt, num_logprobs=0)
        copies = d.share(seq, source, shared_tokens)
        assert (copies is None) == (shared_tokens % 16 == 0)
        d.step([(source, 1), (seq, 6)], copies=copies)
        d.generate([seq, source], OUTPUTS)
        self.same(seq, wanted)
        self.same(source, wanted_source)

    # slots

    def test_nothing_of_the_former_tenant_stays(self, d: Driver, fresh: Driver) -> None:
        """S-14: a slot whose tenant used every table against what comes next: as in a runner that has seen nobody."""
        prompt = d.prompt(12)
        neighbour = None
        for quiet in ({}, {"temperature": 1.0, "seed": 4}, {"repetition": 1.5, "bias": {8: 1.0}, "min_tokens": 2}):
            clean = fresh.new(prompt, **quiet)
            fresh.generate([clean], OUTPUTS)
            fresh.close(clean)
            coming = set(clean.outputs)
            loud = {
                "temperature": 1.5, "top_p": 0.5, "min_p": 0.2, "top_k": 3, "seed": 9, "presence": 2.0,
                "frequency": 2.0, "repetition": 5.0, "min_tokens": 50, "stop_ids": tuple(coming), "num_logprobs": 2,
                "bias": dict.fromkeys(coming, -90.0), "allowed": tuple(v for v in range(199) if v not in coming),
                "bad_words": tuple((v,) for v in coming),
            }  # fmt: skip
            if neighbour is None:  # keeps every part of the sampler busy beside the quiet tenants
                neighbour = d.new(d.prompt(2), **loud)
            noisy = d.new([*coming, *d.prompt(30)], slot=d.free_slots[0], **loud)
            d.generate([noisy], 5)
            assert not coming & set(noisy.outputs)
            d.close(noisy)
            seq = d.new(prompt, slot=noisy.slot, **quiet)
            while len(seq.outputs) < OUTPUTS:
                d.step([(neighbour, neighbour.left), (seq, seq.left)])
            assert seq.outputs == clean.outputs
            d.close(seq)

    def test_a_slot_changes_hands_within_one_step(self, d: Driver) -> None:
        prompt = d.prompt(18)
        wanted = self.alone(d, prompt)
        old = d.new(d.prompt(33), bias={4: 60.0})
        d.generate([old], 2)
        d.close(old)
        seq = d.new(prompt, slot=old.slot, num_logprobs=0)
        plan = d.plan([(seq, 18)])
        assert plan.closed is not None and old.slot in plan.closed
        d.collect(d.submit(plan))
        d.generate([seq], OUTPUTS)
        self.same(seq, wanted)

    def test_a_slot_changes_hands_while_its_tenant_is_in_flight(self, d: Driver) -> None:
        """Slot and pages go to somebody else with the next step; the step in flight is not disturbed."""
        if d.config.max_in_flight < 2:
            pytest.skip("one step in flight")
        prompts = [d.prompt(17), d.prompt(25)]
        wanted = [self.alone(d, p) for p in prompts]
        old = d.new(prompts[0], num_logprobs=0)
        d.generate([old], OUTPUTS - 1)
        free, d.free_pages[0] = d.free_pages[0], []  # the newcomer has to take the old one's pages
        first = d.submit(d.plan([(old, 1)]))
        d.close(old)
        new = d.new(prompts[1], slot=old.slot, num_logprobs=0)
        second = d.submit(d.plan([(new, 25)]))
        assert not d.free_pages[0]
        d.free_pages[0] = free
        d.collect(first)
        d.collect(second)
        d.generate([new], OUTPUTS)
        self.same(old, wanted[0])
        self.same(new, wanted[1])

    def test_a_closed_slot_is_refused(self, d: Driver) -> None:
        seq = d.new(d.prompt(5))
        d.generate([seq], 1)
        plan = d.plan([(seq, 1)])
        with pytest.raises(TwinferError):
            d.runner.submit([replace(plan, generation=plan.generation + 1)])
        d.close(seq)
        d.generate([d.new(d.prompt(2))], 1)  # carries the close
        with pytest.raises(TwinferError):
            d.runner.submit([replace(plan, step_id=d.next_step())])

    def test_many_rows_at_once(self, d: Driver) -> None:
        """Every slot opened in one step, each with a long shared prefix: more table changes than rows."""
        source = d.new(d.prompt(100))
        d.step([(source, 60)])
        d.step([(source, 40)])
        rows = []
        for n in range(d.config.max_slots - 1):
            seq = d.new([*source.tokens[:96], n], num_logprobs=0, temperature=n % 2, seed=n, bias={n: 1.0})
            assert d.share(seq, source, 96) is None
            rows.append((seq, 1))
        d.step(rows)
        d.step(rows)
        seqs = [seq for seq, _ in rows]
        for seq in (*seqs, source):
            d.close(seq)
        for n, seq in enumerate(seqs):
            self.same(seq, self.alone(d, seq.tokens[:97], 2, temperature=n % 2, seed=n, bias={n: 1.0}))

    # programs

    def test_no_compile_after_warm_up(self, d: Driver) -> None:
        rng = random.Random(23)
        before = d.runner.num_compiles()
        for _ in range(12):
            seqs = []
            for _ in range(rng.randint(1, 5)):
                sampling: dict[str, object] = {}
                if rng.random() < 0.5:
                    sampling = {"temperature": rng.random(), "seed": rng.getrandbits(64), "top_k": rng.randint(0, 9)}
                if rng.random() < 0.3:
                    sampling |= {"presence": 0.5, "bias": dict.fromkeys(range(rng.randint(1, 40)), 1.0)}
                if rng.random() < 0.3:
                    sampling |= {"stop_ids": tuple(range(rng.randint(0, 20))), "num_logprobs": rng.randint(0, 20)}
                if rng.random() < 0.2:
                    sampling |= {"allowed": tuple(range(rng.randint(1, 90))), "bad_words": ((4, 5), (6,))}
                seqs.append(d.new(d.prompt(rng.randint(1, 40)), **sampling))
            d.generate(seqs, 2, chunk=rng.randint(3, 64))
            for seq in seqs:
                d.close(seq)
        assert d.runner.num_compiles() == before

    def test_sampler_none_and_greedy_agree_with_full(self, d: Driver) -> None:
        prompt = d.prompt(13)
        seq = d.new(prompt, num_logprobs=0)
        plan = d.plan([(seq, 13)])
        assert plan.sampler is Sampler.GREEDY
        d.collect(d.submit(replace(plan, sampler=Sampler.FULL)))
        d.generate([seq], OUTPUTS)
        self.same(seq, self.alone(d, prompt))
