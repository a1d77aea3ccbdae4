"""The announced part of the conformance suite: late masks, turns on the device, drafts; refusals of all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import TwinferError
from engine.runner import Capability
from engine.step import (
    CrossEncodes,
    Drafts,
    PromptLogprobs,
    StateSlots,
    Transfers,
    empty_plan,
)
from tests.backends.conformance_fixtures import TOLERANCE, Fixtures
from tests.backends.driver import Driver, Seq, ragged


class FeatureConformance(Fixtures):
    """Part of Conformance."""

    def test_what_is_not_announced_is_refused(self, d: Driver) -> None:
        none = np.zeros(0, np.int32)
        wide = np.zeros(0, np.int64)
        parts: dict[Capability, dict[str, object]] = {
            Capability.LATE_MASK: {"late_mask": True},
            Capability.MULTI_STEP: {"num_steps": 2},
            Capability.DRAFTS: {"drafts": Drafts(num_drafts=np.zeros(1, np.int32))},
            Capability.STATE: {"states": (StateSlots(group=0, read=none - 1, write=none),)},
            Capability.CROSS: {"encodes": CrossEncodes(group=0, media_id=wide, pages=ragged([]), num_tokens=none)},
            Capability.TRANSFERS: {
                "transfers": Transfers(transfer_id=wide, kind=np.zeros(0, np.uint8), pool=none, pages=ragged([]))
            },
            Capability.PROMPT_LOGPROBS: {"prompt_logprobs": PromptLogprobs(token_idx=none, targets=none, num_top=0)},
            Capability.POOLING: {"pooling": np.ones(1, np.int32)},
        }
        missing = [c for c in parts if c not in d.device.capabilities]
        for capability in missing:
            seq = d.new([1, 2, 3])
            plan = d.plan([(seq, 3)])
            with pytest.raises(TwinferError):
                d.runner.submit([replace(plan, **parts[capability])])
            seq.opened = False
            d.close(seq)
        if Capability.REPLICAS not in d.device.capabilities:
            plan = empty_plan(d.next_step(), d.bucket(0, 0))
            with pytest.raises(TwinferError):
                d.runner.submit([plan, plan])
        seq = d.new([1, 2, 3])
        with pytest.raises(TwinferError):  # adapters: no capability announces them yet
            d.runner.submit([replace(d.plan([(seq, 3)]), adapter_slots=np.zeros(1, np.int32))])
        seq.opened = False

    @pytest.mark.parametrize("temperature", [0.0, 2.0])
    def test_late_mask(self, d: Driver, temperature: float) -> None:
        """Only allowed ids come out; a row without a mask is free; the next step may be submitted before the mask."""
        self.need(d, Capability.LATE_MASK)
        prompts = [d.prompt(9), d.prompt(4)]
        sampling = {"temperature": temperature, "seed": 2}
        allowed = [(7, 66, 198), (0, 31, 32)]
        wanted = self.alone(d, prompts[0], 3, **sampling)
        free, bound = d.new(prompts[0], num_logprobs=0, **sampling), d.new(prompts[1], **sampling)
        late = []
        for turn in range(2):
            plan = d.plan([(s, s.left if turn == 0 else 1) for s in (free, bound)], late_mask=True)
            late.append(d.submit(plan))
            if turn == 0 and d.config.max_in_flight < 2:
                self.mask(d, late[0], allowed[0])
                d.collect(late.pop(0))
        for handle, ids in zip(late, allowed[-len(late) :], strict=True):
            self.mask(d, handle, ids)
            d.collect(handle)
        d.generate([free, bound], 3)
        self.same(free, wanted)
        assert bound.outputs[0] in allowed[0] and bound.outputs[1] in allowed[1]

    def mask(self, d: Driver, handle: object, ids: Sequence[int]) -> None:
        """Row 1 may take only `ids`."""
        bits = np.zeros((1, -(-d.arch.vocab_size // 32)), np.uint32)
        for v in ids:
            bits[0, v // 32] |= np.uint32(1 << (v % 32))
        d.runner.provide_mask(handle, np.array([1], np.int32), bits)

    def test_late_mask_of_the_likeliest_allowed(self, d: Driver) -> None:
        self.need(d, Capability.LATE_MASK)
        prompt = d.prompt(5)
        pair, other = d.new(d.prompt(2)), d.new(prompt, num_logprobs=5)
        handle = d.submit(d.plan([(pair, 2), (other, 5)], late_mask=True))
        self.mask(d, handle, range(d.arch.vocab_size))
        result = d.collect(handle)
        assert result.logprobs is not None
        third = int(result.logprobs.top_ids[1, 2])
        other = d.new(prompt)
        pair = d.new(d.prompt(2))
        handle = d.submit(d.plan([(pair, 2), (other, 5)], late_mask=True))
        self.mask(d, handle, [third, int(result.logprobs.top_ids[1, 4])])
        d.collect(handle)
        assert other.outputs == [third]

    @pytest.mark.parametrize("num_logprobs", [-1, 2])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_several_turns_on_the_device(self, d: Driver, temperature: float, num_logprobs: int) -> None:
        """k turns give what k steps give; stop ids and max_outputs end a row early; borders of pages do not matter."""
        self.need(d, Capability.MULTI_STEP)
        sampling = {"temperature": temperature, "seed": 5}
        prompts = [d.prompt(5), d.prompt(17), d.prompt(30)]
        wanted = [self.alone(d, p, 9, **sampling) for p in prompts]
        prompts[1], wanted[1], stop = self.stopping(d, 17, 9, **sampling)
        taken = wanted[1].outputs.index(stop)  # turns after the first output
        more = [{}, {"stop_ids": (stop,)}, {"max_outputs": 3}]
        seqs = [d.new(p, num_logprobs=num_logprobs, **sampling, **m) for p, m in zip(prompts, more, strict=True)]
        d.step([(s, s.left) for s in seqs])
        result = d.step([(s, 1) for s in seqs], num_steps=8)
        assert result.tokens.shape == (3, 8)
        assert result.num_sampled.tolist() == [8, taken, 2]
        for seq, want, count in zip(seqs, wanted, (9, taken + 1, 3), strict=True):
            assert seq.outputs == want.outputs[:count]
            if num_logprobs >= 0:
                np.testing.assert_allclose(seq.logprobs, want.logprobs[:count], atol=TOLERANCE)

    def stopping(self, d: Driver, length: int, num_outputs: int, **sampling: object) -> tuple[list[int], Seq, int]:
        """A prompt, its answer, and an id to stop at: one that is not the first output."""
        while True:
            prompt = d.prompt(length)
            seq = self.alone(d, prompt, num_outputs, **sampling)
            for token in seq.outputs:
                if token != seq.outputs[0]:
                    return prompt, seq, token

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "repetition": 1.3}])
    def test_turns_behind_turns(self, d: Driver, sampling: dict[str, object]) -> None:
        """Steps of several turns and of one follow each other in flight; a row that ended meanwhile disturbs nobody."""
        self.need(d, Capability.MULTI_STEP)
        prompts = [d.prompt(6), d.prompt(14), d.prompt(29)]
        wanted = [self.alone(d, p, 12, **sampling) for p in prompts]
        prompts[1], wanted[1], stop = self.stopping(d, 14, 12, **sampling)
        taken = wanted[1].outputs.index(stop)
        seqs = [d.new(p, **sampling, stop_ids=(stop,) if i == 1 else ()) for i, p in enumerate(prompts)]
        d.step([(s, s.left) for s in seqs])
        flying = []
        for turns in (4, 3, 1, 3):
            flying.append(d.submit(d.plan([(s, 1) for s in seqs], num_steps=turns)))
            if len(flying) == d.config.max_in_flight:
                d.collect(flying.pop(0))
        while flying:
            d.collect(flying.pop(0))
        for seq, want in zip(seqs[::2], wanted[::2], strict=True):
            assert seq.outputs == want.outputs
        assert seqs[1].outputs[: taken + 1] == wanted[1].outputs[: taken + 1]
        slot = seqs[1].slot
        d.close(seqs[1])
        after = d.new(prompts[0], slot=slot, num_logprobs=0, **sampling)
        d.step([(after, after.left)])
        d.step([(after, 1)], num_steps=8)
        d.generate([after], 12)
        self.same(after, wanted[0])

    def test_turns_of_what_does_not_decode_are_refused(self, d: Driver) -> None:
        """A prompt in prefill, more turns than were configured, and beyond the model's length."""
        self.need(d, Capability.MULTI_STEP)
        seq = d.new(d.prompt(9))
        plan = d.plan([(seq, 4)])
        with pytest.raises(TwinferError):
            d.runner.submit([replace(plan, num_steps=2)])
        d.step_id, seq.planned, seq.opened = d.step_id + 1, 0, False
        d.close(seq)
        seq = d.new(d.prompt(d.config.max_model_len - 2))
        d.generate([seq], 1, chunk=64)
        plan = d.plan([(seq, 1)])
        for turns in (d.config.max_num_steps + 1, 3):
            with pytest.raises(TwinferError):
                d.runner.submit([replace(plan, num_steps=turns)])
        d.rows_of.clear()

    def test_drafts_change_nothing_but_the_pace(self, d: Driver) -> None:
        """Right drafts are accepted, wrong ones cost nothing, and the tokens are those of plain steps."""
        self.need(d, Capability.DRAFTS)
        for temperature in (0.0, 1.0):
            prompt = d.prompt(11)
            wanted = self.alone(d, prompt, 10, temperature=temperature, seed=3)
            seq = d.new(prompt, temperature=temperature, seed=3)
            d.step([(seq, 11)])
            right = wanted.outputs[1:4]
            assert d.collect(d.submit(d.draft_plan([(seq, right)]))).num_sampled.tolist() == [4]
            wrong = [wanted.outputs[5], (wanted.outputs[6] + 1) % d.arch.vocab_size, wanted.outputs[7]]
            assert d.collect(d.submit(d.draft_plan([(seq, wrong)]))).num_sampled.tolist() == [2]
            d.generate([seq], 10)
            assert seq.outputs[:10] == wanted.outputs
            d.close(seq)
