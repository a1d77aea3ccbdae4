"""A step as plain torch calls, any shape: forward, scores of prompt tokens, sampling.

Called by the runner: on a CPU from `collect`, on a GPU from `submit`. backends/torch/graphs.py takes a GPU's decode
steps away from here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backends.torch.batch import Batch, Ends, known_ids, newest, newest_rows, pack, rows_with, works_of
from backends.torch.results import Outcome, Scores
from backends.torch.sample import pick, score
from backends.torch.step import Loaded, Step
from cuda_kernels.dispatch import Work, copy_page
from engine.errors import fail
from engine.opened import Use
from engine.runner import Progress
from engine.step import Sampler, StepPlan
from torch_models import last_layer

SCORE_BYTES = 256 << 20  # logits of prompt tokens that are scored together


class EagerSteps:
    least_tokens: int | None = 128
    """Of a step whose last layer takes the sampled tokens alone, behind all keys and values; None: no step is so."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def warm_up(self, progress: Progress | None = None) -> None:
        """Nothing is compiled; one call loads what torch loads lazily."""
        decoder = self._loaded.decoder
        shape = (1, decoder.spec.hidden_size)
        self.logits(torch.zeros(shape, dtype=decoder.embed.dtype, device=self._loaded.tables.device))
        if progress is not None:
            progress("warm_up", 1, 1)

    def num_compiles(self) -> int:
        return 0

    def prepare(self, step: Step) -> None:
        """Copy out of the plan what the later jobs read."""
        step.batch = pack(step.plan, self._loaded.tables)
        step.ends = self._ends(step.plan)
        step.sampling_slots = self._loaded.tables.to_device(step.plan.slots[step.sampling_rows].astype(np.int64))

    def _ends(self, plan: StepPlan) -> Ends | None:
        """The sampled rows; None where the last layer takes every token."""
        count = len(plan.logit_rows)
        many = self.least_tokens is not None and plan.num_tokens >= max(self.least_tokens, 2 * count)
        rows = newest_rows(plan) if many and plan.prompt_logprobs is None else None
        if rows is None:
            return None
        ends = np.repeat(np.array([[0], [self._loaded.config.max_slots], [1]], np.int32), self.padded(count), axis=1)
        ends[:, :count] = plan.logit_rows, plan.slots[rows], plan.num_computed[rows] + plan.num_new[rows]
        return Ends(self._loaded.tables.to_device(ends), (ends[2] - 1).tolist())

    def padded(self, count: int) -> int:
        """Z of so many sampled rows."""
        return count

    def take_mask(self, step: Step, allowed: np.ndarray) -> None:
        """allowed: bool [L, V] of the sampling rows."""
        step.mask = self._loaded.tables.to_device(allowed)

    def lose(self) -> bool:
        """After a failure that torch raised: whether cache and tables were lost with it, and are empty ones now."""
        return False

    def forward(self, step: Step) -> None:
        """Table updates, copies, the model, logits of the sampling rows, scores of prompt tokens."""
        decoder, tables = self._loaded.decoder, self._loaded.tables
        plan, batch = step.plan, step.batch
        if batch is None:
            fail(f"step {step.step_id} was not prepared")
        self.update_tables(plan)
        ids, bad = known_ids(batch, tables, decoder.spec.vocab_size)
        if plan.num_rows:
            hidden, sampled = self.passed(step, batch, ids)
        else:
            hidden = torch.zeros(0, decoder.spec.hidden_size, device=tables.device, dtype=decoder.embed.dtype)
            sampled = hidden
        logits = self.logits(sampled)
        broken = rows_with(batch, ~hidden.sum(dim=1, dtype=torch.float32).isfinite())
        scores = self._score_prompt(hidden, plan)
        step.outcome = Outcome(logits=logits, bad=bad, broken=broken, prompt_scores=scores)

    def passed(self, step: Step, batch: Batch, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D], and those that logits are wanted of, [L, D].

        The former may stand in front of the last layer where the plan wants no scores of prompt tokens.
        """
        if step.ends is None:
            hidden = self.hidden(batch, ids)
            return hidden, hidden[batch.logit_rows]
        (works, places), decoder = self._places(batch), self._loaded.decoder
        turns = decoder.turns(batch.positions)
        hidden = last_layer.front(decoder, ids, turns, *places, works)
        last_layer.write(decoder, hidden, turns, *places, works)
        if not len(batch.logit_rows):
            return hidden, hidden[:0]
        few = newest(batch, step.ends)
        works, places = self._places(few)
        return hidden, last_layer.behind(
            decoder, hidden[batch.logit_rows], decoder.turns(few.positions), *places, works
        )

    def hidden(self, batch: Batch, ids: Tensor) -> Tensor:
        """What the last layer leaves, as `logits` takes it: [T, D]. ids: i64 [T] in [0, V)."""
        works, places = self._places(batch)
        return self._loaded.decoder(ids, batch.positions, *places, works)[0]

    def _places(self, batch: Batch) -> tuple[list[Work], tuple[list[Tensor], list[tuple[int, int, int]]]]:
        """Attention's work, and where keys and values lie."""
        loaded = self._loaded
        works = works_of(batch, loaded.tables, loaded.layout, loaded.decoder.embed.dtype, loaded.caches[0].dtype)
        return works, (loaded.caches, loaded.places)

    def logits(self, hidden: Tensor) -> Tensor:
        """f32 [T, V]. hidden: [T, D]."""
        return self._loaded.decoder.logits(hidden)

    def sample(self, step: Step) -> None:
        outcome, plan, tables = step.outcome, step.plan, self._loaded.tables
        if outcome is None or step.sampling_slots is None:
            fail(f"step {step.step_id} has not run")
        logits = outcome.logits
        plain = step.uses is Use.NONE or (plan.sampler is Sampler.GREEDY and not plan.late_mask)
        if plain:
            largest, tokens = logits.max(dim=1)  # a NaN is its row's largest, and flags the row
        else:
            largest, tokens = logits.amax(dim=1), self.pick(step, logits)
        tables.advance(step.sampling_slots, tokens)
        scores = self.score(logits, tokens, plan.num_logprobs) if plan.num_logprobs >= 0 else None
        outcome.finish(tokens, largest, scores)

    def score(self, logits: Tensor, targets: Tensor, num_top: int) -> Scores:
        """Raw log-probabilities. logits: f32 [L, V]; targets: i64 [L]."""
        return score(logits, targets, num_top)

    def pick(self, step: Step, logits: Tensor) -> Tensor:
        """Token ids i64 [L] of rows that need more than the largest logit. logits: f32 [L, V]."""
        if step.sampling_slots is None:
            fail(f"step {step.step_id} was not prepared")
        return pick(logits, step.sampling_slots, step.mask, self._loaded.tables, step.uses)

    def update_tables(self, plan: StepPlan) -> None:
        """What a plan brings before its forward pass."""
        tables = self._loaded.tables
        if plan.opened is not None:
            tables.open(plan.opened)
        for group, delta in enumerate(plan.page_deltas):
            if delta is not None and len(delta.slots):
                tables.set_pages(group, delta)
        if plan.copies is not None:
            self.copy_pages(plan)

    def _score_prompt(self, hidden: Tensor, plan: StepPlan) -> list[Scores]:
        scored, pieces = plan.prompt_logprobs, []
        if scored is None:
            return []
        tables, vocab = self._loaded.tables, self._loaded.decoder.spec.vocab_size
        piece = max(1, SCORE_BYTES // (4 * vocab))
        for start in range(0, len(scored.targets), piece):
            chosen = tables.to_device(scored.token_idx[start : start + piece].astype(np.int64))
            targets = tables.to_device(scored.targets[start : start + piece].astype(np.int64))
            safe = targets.clamp(0, vocab - 1)
            pieces.append(self.score(self.logits(hidden[chosen]), safe, scored.num_top))
        return pieces

    def copy_pages(self, plan: StepPlan) -> None:
        copies = plan.copies
        if copies is None:
            return
        for i in range(len(copies.source)):
            parts = (copies.pool, copies.source, copies.target, copies.tokens)
            pool, source, target, count = (int(part[i]) for part in parts)
            copy_page(self._loaded.caches[pool], source, target, count, self._loaded.layout.pools[pool].page_tokens)
