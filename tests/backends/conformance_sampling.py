"""The sampling half of the conformance suite: processors, seeds, logprobs, ids that slipped past validation (R3)."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from engine.runner import Capability
from engine.step import (
    PromptLogprobs,
    RowError,
    StepPlan,
)
from tests.backends.conformance_fixtures import TOLERANCE, Fixtures
from tests.backends.driver import Driver, Seq
from tests.reference.philox import gumbel


class SamplingConformance(Fixtures):
    """Part of Conformance."""

    # sampling

    def test_seeds(self, d: Driver) -> None:
        prompt = d.prompt(10)
        wanted = self.alone(d, prompt, 12, temperature=1.0, seed=2**63 + 5)
        strangers = [d.new(d.prompt(n), temperature=1.0, seed=n) for n in (3, 11)]
        same = d.new(prompt, temperature=1.0, seed=2**63 + 5, num_logprobs=0)
        others = [d.new(prompt, temperature=1.0, seed=s) for s in (5, 2**63 + 6, 2**32 + 5)]
        d.generate([*strangers, *others, same], 12, chunk=20)
        assert same.outputs == wanted.outputs
        assert len({tuple(s.outputs) for s in (*others, same)}) == 4

    def test_randomness_is_that_of_the_reference(self, d: Driver) -> None:
        """So hot that the noise alone decides: Philox of (seed, output index, id), whatever the logits are."""
        for seed in (0, 2**33 + 7):
            seq = self.alone(d, d.prompt(4), 4, temperature=1e9, seed=seed)
            assert seq.outputs == [int(np.argmax(gumbel(seed, k, d.arch.vocab_size))) for k in range(4)]

    @pytest.mark.parametrize(
        "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}], ids=lambda x: next(iter(x))
    )
    def test_narrow_sampling_is_greedy(self, d: Driver, narrow: dict[str, float]) -> None:
        prompt = d.prompt(8)
        sampling = {"temperature": 1.0, "seed": 1} | narrow
        assert self.alone(d, prompt, **sampling).outputs == self.alone(d, prompt).outputs

    def test_allowed_ids(self, d: Driver) -> None:
        allowed = (3, 64, 190)
        for temperature in (0.0, 2.0):
            seq = self.alone(d, d.prompt(6), 10, allowed=allowed, temperature=temperature)
            assert set(seq.outputs) <= set(allowed)

    def test_bias_decides_and_logprobs_are_raw(self, d: Driver) -> None:
        prompt = d.prompt(6)
        plain = d.new(prompt, num_logprobs=0, bias={77: 0.0})
        forced = d.new(prompt, num_logprobs=3, bias={77: 90.0})
        d.step([(plain, 6)])
        result = d.step([(forced, 6)])
        assert forced.outputs == [77] and result.logprobs is not None
        assert result.logprobs.rank[0] > 1 and forced.logprobs[0] < plain.logprobs[0]
        assert result.logprobs.top_ids[0, 0] == plain.outputs[0]
        assert abs(result.logprobs.top[0, 0] - plain.logprobs[0]) < TOLERANCE

    def test_min_tokens_bans_stop_ids(self, d: Driver) -> None:
        seq = self.alone(d, d.prompt(6), 7, bias={50: 90.0, 51: 80.0}, stop_ids=(50, 51), min_tokens=4)
        assert not {50, 51} & set(seq.outputs[:4]) and set(seq.outputs[4:]) == {50}

    def test_bad_words(self, d: Driver) -> None:
        prompt = d.prompt(6)
        bias = {50: 90.0, 51: 80.0}
        assert self.alone(d, prompt, 4, bias=bias, bad_words=((50,),)).outputs == [51] * 4
        # 50 may not follow 50; only generated ids count as what stands before
        prompt[-1] = 50
        assert self.alone(d, prompt, 5, bias=bias, bad_words=((50, 50),)).outputs == [50, 51, 50, 51, 50]
        assert self.alone(d, prompt, 5, bias=bias, bad_words=((50, 50, 50),)).outputs == [50, 50, 51, 50, 50]

    def test_penalties_look_at_the_right_ids(self, d: Driver) -> None:
        prompt = [9, 8, 7, 6, 5, 4]  # none of the biased ids
        bias = {50: 90.0, 51: 60.0}
        assert self.alone(d, prompt, 3, bias=bias).outputs == [50] * 3
        for name in ("presence", "frequency"):
            seq = self.alone(d, [*prompt, 50], 2, bias=bias, **{name: 60.0})
            assert seq.outputs == [50, 51]  # the 50 in the prompt does not count
        seq = self.alone(d, [*prompt, 50], 3, bias={50: 90.0, 51: 80.0, 52: 70.0}, repetition=2.0)
        assert seq.outputs == [51, 52, 50]  # the 50 in the prompt counts: 45 against 80 and 70

    def test_logprobs(self, d: Driver) -> None:
        seqs = [d.new(d.prompt(7), num_logprobs=5, temperature=t, seed=8) for t in (0.0, 3.0)]
        d.step([(s, 7) for s in seqs])
        for _ in range(5):
            result = d.step([(s, 1) for s in seqs])
            top = result.logprobs
            assert top is not None and top.top_ids.shape == (2, 5)
            assert (np.diff(top.top, axis=1) <= 0).all() and (np.exp(top.top).sum(axis=1) <= 1 + 1e-5).all()
            for r in range(2):
                token, rank = int(result.tokens[r, 0]), int(top.rank[r])
                assert len(set(top.top_ids[r].tolist())) == 5 and (top.top_ids[r] >= 0).all()
                if rank <= 5:
                    assert abs(top.top[r, rank - 1] - top.chosen[r]) < 1e-6
                    assert top.top_ids[r, rank - 1] == token
                else:
                    assert top.chosen[r] <= top.top[r, 4]
            assert top.rank[0] == 1

    def test_prompt_logprobs(self, d: Driver) -> None:
        """The prompt's logprobs are those that decoding gave to the same ids."""
        self.need(d, Capability.PROMPT_LOGPROBS)
        decoded = self.alone(d, d.prompt(6), 9)
        whole = decoded.tokens
        got: list[float] = []
        seq = d.new(whole, num_logprobs=0)
        for n in (5, 7, 3):
            first = seq.planned
            index = np.arange(n if first + n < len(whole) else n - 1, dtype=np.int32)
            targets = np.array(whole, np.int32)[first + 1 + index]
            wanted = PromptLogprobs(token_idx=index, targets=targets, num_top=2)
            result = d.step([(seq, n)], prompt_logprobs=wanted)
            scores = result.prompt_logprobs
            assert (
                scores is not None and scores.chosen.shape == (len(index),) and scores.top_ids.shape == (len(index), 2)
            )
            assert ((scores.rank == 1) == (scores.top_ids[:, 0] == targets)).all()
            got += scores.chosen.tolist()
        np.testing.assert_allclose(got[5:], decoded.logprobs, atol=TOLERANCE)

    # bad ids (R3)

    def poisoned(self, d: Driver, spoil: object, **sampling: object) -> tuple[list[Seq], list[float], np.ndarray]:
        """Two steps of a victim between two neighbours; `spoil(plan)` damages the victim's part of the first plan."""
        rng = random.Random(17)
        prompts = [[rng.randrange(d.arch.vocab_size) for _ in range(n)] for n in (7, 9, 5)]
        slots = sorted(d.free_slots)[:3]
        neighbour = {"num_logprobs": 4, "temperature": 1.0, "seed": 6}
        seqs = [
            d.new(p, slot=s, **(sampling if i == 1 else neighbour))
            for i, (p, s) in enumerate(zip(prompts, slots, strict=True))
        ]
        plan = d.plan([(s, len(s.tokens)) for s in seqs])
        result = d.collect(d.submit(spoil(plan)))
        values: list[float] = []
        error = result.error
        for _ in range(3):
            assert result.logprobs is not None
            for part in (result.logprobs.chosen, result.logprobs.top, result.logprobs.top_ids, result.tokens[:, 0]):
                values += [float(v) for v in np.delete(part, 1, axis=0).reshape(-1)]
            result = d.step([(s, 1) for s in seqs])
        for seq in seqs:
            d.close(seq)
        return seqs, values, error

    @pytest.mark.parametrize("bad", [-(2**31), -1000, 199, 2**31 - 1])
    @pytest.mark.parametrize("where", ["token", "stop", "bias", "allowed", "history"])
    def test_bad_ids_stay_with_their_row(self, d: Driver, where: str, bad: int) -> None:
        """Ids that slipped past validation: the neighbours are bitwise unchanged, the row is flagged."""
        assert d.arch.vocab_size == 199
        tables = {
            "token": {},
            "stop": {"stop_ids": (4, 5), "min_tokens": 3},
            "bias": {"bias": {4: 1.0, 5: 2.0}},
            "allowed": {"allowed": (4, 5, 6)},
            "history": {"repetition": 1.2, "presence": 0.5},
        }[where]

        def spoil(plan: StepPlan) -> StepPlan:
            if where == "token":
                ids = plan.token_ids.copy()
                ids[7 + 4] = bad
                return replace(plan, token_ids=ids)
            assert plan.opened is not None
            name = "history" if where == "history" else f"{where}_ids"
            part = getattr(plan.opened.sampling, name)
            values = part.values.copy()
            values[0] = bad
            return replace(
                plan,
                opened=replace(
                    plan.opened, sampling=replace(plan.opened.sampling, **{name: replace(part, values=values)})
                ),
            )

        _, clean, error = self.poisoned(d, lambda plan: plan, **tables)
        assert error.tolist() == [0, 0, 0]
        seqs, values, error = self.poisoned(d, spoil, **tables)
        assert values == clean
        assert error.tolist() == [0, RowError.BAD_TOKEN_ID, 0]
        assert all(0 <= t < 199 for t in seqs[1].outputs)

    def test_bad_prompt_targets_stay_with_their_row(self, d: Driver) -> None:
        self.need(d, Capability.PROMPT_LOGPROBS)
        scores = []
        for bad in (3, 2**31 - 1):
            a, b = d.new([5, 6, 7], slot=0), d.new([8, 9, 10], slot=1)
            wanted = PromptLogprobs(
                token_idx=np.array([0, 1, 3], np.int32), targets=np.array([6, 7, bad], np.int32), num_top=1
            )
            result = d.step([(a, 3), (b, 3)], prompt_logprobs=wanted)
            assert result.prompt_logprobs is not None
            scores.append(result.prompt_logprobs.chosen[:2].tolist())
            assert result.error.tolist() == [0, 0 if bad == 3 else RowError.BAD_TOKEN_ID]
            d.close(a)
            d.close(b)
        assert scores[0] == scores[1]
