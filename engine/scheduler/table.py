"""RowTable: running requests as rows of numpy tables, one row a slot of the device. A decode step touches nothing else.

    tokens of a row:  [0, num_known) known when it was opened | [num_known, num_tokens) collected since | in flight
                      [0, num_computed) their KV is computed or being computed by a submitted step
    length = num_tokens + tokens that steps in flight will sample;  num_computed <= length <= max_total

Always true: `generation` of a slot changes when its tenancy ends and when one begins, so a result that belongs to a
former tenant is told by comparing generations (S-10); a free slot has num_computed == length == 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import fail
from engine.params import SamplingParams
from engine.scheduler.admission import num_logprobs
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.queues import Entry
from engine.step import F32, I32, I64, U64

NEVER_KEYED = np.iinfo(np.int32).max
Bools = npt.NDArray[np.bool_]


class SamplingColumns:
    """The numeric part of step.SamplingTable, one entry a slot: columns that a plan gathers together lie together."""

    def __init__(self, num_slots: int) -> None:
        # temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty
        self.floats: F32 = np.zeros((6, num_slots), np.float32)
        # top_k, num_outputs, min_tokens, max_outputs, num_logprobs
        self.ints: I32 = np.zeros((5, num_slots), np.int32)
        self.seed: U64 = np.zeros(num_slots, np.uint64)
        self.num_logprobs: I32 = self.ints[4]  # the same memory

    def set(self, slot: int, params: SamplingParams, seed: int, ints: tuple[int, int, int]) -> None:
        """ints: num_outputs, max_outputs, num_logprobs."""
        self.floats[:, slot] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        )
        self.ints[:, slot] = (max(params.top_k, 0), ints[0], params.min_tokens, ints[1], ints[2])
        self.seed[slot] = seed


def wants_prompt_scores(entry: Entry) -> bool:
    """Whether prompt logprobs are still to be computed: such a request reads no prefix hits."""
    request = entry.request
    return request.params.prompt_logprobs is not None and not entry.prompt_logprobs_sent and request.num_prompt > 1


class RowTable:
    """State of all slots. The scheduler is the one owner; budget, plan and update read and write it for it."""

    def __init__(self, config: SchedulerConfig, unit_tokens: int) -> None:
        slots = config.max_num_seqs
        units = -(-config.max_model_len // unit_tokens)
        self.config = config
        # pages of zeros that no row has reached cost no memory
        self.tokens: I32 = np.zeros((slots, units * unit_tokens), np.int32)  # [slots, max_model_len to a whole unit]
        self.units = self.tokens.reshape(slots, units, unit_tokens)  # the same memory
        self.flat = self.tokens.reshape(-1)  # the same memory
        self.row_start: I64 = np.arange(slots, dtype=np.int64) * self.tokens.shape[1]  # of each row in `flat`
        # numbers of a row's progress; all zero while the slot is free
        self._progress: I32 = np.zeros((7, slots), np.int32)
        self.key: I64 = np.zeros(slots, np.int64)  # request key
        self.generation: I32 = np.zeros(slots, np.int32)
        self.num_known: I32 = self._progress[0]
        self.num_tokens: I32 = self._progress[1]
        self.length: I32 = self._progress[2]
        self.num_computed: I32 = self._progress[3]
        self.collected: I32 = self._progress[4]  # tokens whose KV was computed by collected steps
        self.max_total: I32 = self._progress[5]
        self.min_total: I32 = np.zeros(slots, np.int32)  # num_prompt + min_tokens: no stop id counts before
        self.num_cached: I32 = np.zeros(slots, np.int32)  # prompt tokens found in the prefix cache
        self.num_keyed: I32 = np.full(slots, NEVER_KEYED, np.int32)  # units, NEVER_KEYED = no prefix caching
        self.reserve_to: I32 = self._progress[6]  # tokens whose pages others must leave to this row
        self.chunk: I32 = np.zeros(slots, np.int32)  # most tokens a step
        self.needs_full = np.zeros(slots, np.bool_)  # of the full sampler
        self.scores_prompt = np.zeros(slots, np.bool_)  # wants prompt logprobs that are not all sent
        self.sampling = SamplingColumns(slots)
        self.entries: list[Entry | None] = [None] * slots
        self.tails: list[bytes] = [b""] * slots  # key of unit num_keyed - 1
        # how many running rows stop at an id: most sampled tokens need no closer look
        self.stop_refs: I32 = np.zeros(config.vocab_size, np.int32)  # [V]
        self.stop_sets: list[frozenset[int]] = [frozenset()] * slots
        self.num_prompt_scorers = 0
        self._free = list(range(slots - 1, -1, -1))  # stack, low slots on top

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    def open(self, entry: Entry, num_hit_tokens: int) -> int:
        """Begin a tenancy for `entry` with `num_hit_tokens` computed already. -> its slot."""
        request, params = entry.request, entry.request.params
        slot = self._free.pop()
        tokens = request.all_tokens()
        known = len(tokens)
        self.tokens[slot, :known] = tokens
        self.key[slot] = request.key
        self.generation[slot] += 1
        self.num_known[slot] = self.num_tokens[slot] = self.length[slot] = self.reserve_to[slot] = known
        self.num_computed[slot] = self.collected[slot] = num_hit_tokens
        self.max_total[slot] = entry.max_total
        self.min_total[slot] = request.num_prompt + params.min_tokens
        if entry.num_cached < 0:
            entry.num_cached = min(num_hit_tokens, request.num_prompt)
        self.num_cached[slot] = entry.num_cached
        self.needs_full[slot] = not params.is_greedy
        scores = wants_prompt_scores(entry)
        self.scores_prompt[slot] = scores
        self.num_prompt_scorers += scores
        self.chunk[slot] = min(self.config.max_chunk, self.config.max_prompt_logprob_tokens if scores else known)
        ints = (len(request.outputs), entry.max_total - request.num_prompt, num_logprobs(params.logprobs, self.config))
        self.sampling.set(slot, params, request.seed, ints)
        self.entries[slot] = entry
        self.stop_sets[slot] = stops = frozenset(request.stop_ids)
        for token in stops:
            self.stop_refs[token] += 1
        entry.slot = slot
        return slot

    def close(self, slot: int) -> Entry:
        """End the tenancy. The generated tokens go back to the request."""
        entry = self.entry(slot)
        request = entry.request
        request.outputs = self.tokens[slot, request.num_prompt : self.num_tokens.item(slot)].tolist()
        self.generation[slot] += 1
        self._progress[:, slot] = 0
        self.num_keyed[slot] = NEVER_KEYED
        if self.scores_prompt[slot]:
            self.num_prompt_scorers -= 1
            self.scores_prompt[slot] = False
        for token in self.stop_sets[slot]:
            self.stop_refs[token] -= 1
        self.stop_sets[slot] = frozenset()
        self.entries[slot] = None
        self._free.append(slot)
        entry.slot = -1
        return entry

    def entry(self, slot: int) -> Entry:
        entry = self.entries[slot]
        if entry is None:
            fail(f"slot {slot} is not open")
        return entry
