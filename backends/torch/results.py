"""From device tensors to a StepResult: one copy to the host for what the engine waits for.

Letters: S rows · L sampling rows · M scored prompt tokens · k top entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.step import I32, Logprobs, RowError, StepPlan, StepResult

Scores = tuple[Tensor, Tensor, Tensor, Tensor]
"""chosen f32 [n], rank i32 [n], top ids i32 [n, k], top f32 [n, k]"""


@dataclass(slots=True)
class Outcome:
    """What a step left on the device."""

    logits: Tensor  # f32 [L, V]
    bad: Tensor  # bool [S] rows whose token ids were clamped
    broken: Tensor  # bool [S] rows with a hidden state that is not finite, at any of their tokens
    prompt_scores: list[Scores] = field(default_factory=list)
    packed: Tensor | None = None  # i64 [2L + 2S] on the host: tokens, non-finite logits, broken, bad
    scores: Scores | None = None
    ready: torch.cuda.Event | None = None

    def finish(self, tokens: Tensor, scores: Scores | None) -> None:
        """Begin the copy to the host."""
        # +inf and NaN are not less than +inf; -inf is lawful
        unfit = ~(self.logits < torch.inf).all(dim=1)
        packed = torch.cat([tokens, unfit.long(), self.broken.long(), self.bad.long()])
        self.packed = packed.to("cpu", non_blocking=True)
        self.scores = scores
        if packed.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()


def read_result(plan: StepPlan, sampling_rows: I32, poisoned: I32, outcome: Outcome) -> StepResult:
    """Wait for the device. Raises what the device raised."""
    if outcome.ready is not None:
        outcome.ready.synchronize()
    packed = outcome.packed.numpy() if outcome.packed is not None else np.zeros(0, np.int64)
    count = len(sampling_rows)
    num_sampled = np.zeros(plan.num_rows, np.int32)
    tokens = np.zeros((plan.num_rows, 1), np.int32)
    error = np.zeros(plan.num_rows, np.uint8)
    num_sampled[sampling_rows] = 1
    tokens[sampling_rows, 0] = packed[:count]
    error[sampling_rows[packed[count : 2 * count] != 0]] = RowError.NON_FINITE
    error[packed[2 * count : 2 * count + plan.num_rows] != 0] = RowError.NON_FINITE
    error[packed[2 * count + plan.num_rows :] != 0] = RowError.BAD_TOKEN_ID
    error[poisoned] = RowError.BAD_TOKEN_ID
    return StepResult(
        step_id=plan.step_id,
        num_sampled=num_sampled,
        tokens=tokens,
        error=error,
        logprobs=None if outcome.scores is None else spread(outcome.scores, sampling_rows, plan.num_rows),
        prompt_logprobs=gather(outcome.prompt_scores) if outcome.prompt_scores else None,
    )


def spread(scores: Scores, rows: I32, num_rows: int) -> Logprobs:
    """Scores of the sampling rows, put at their rows."""
    chosen, rank, ids, top = (part.cpu().numpy() for part in scores)
    result = Logprobs(
        chosen=np.zeros(num_rows, np.float32),
        rank=np.zeros(num_rows, np.int32),
        top_ids=np.full((num_rows, ids.shape[1]), -1, np.int32),
        top=np.full((num_rows, ids.shape[1]), -np.inf, np.float32),
    )
    result.chosen[rows], result.rank[rows], result.top_ids[rows], result.top[rows] = chosen, rank, ids, top
    return result


def gather(pieces: list[Scores]) -> Logprobs:
    """Scores of prompt tokens, piece after piece."""
    chosen, rank, ids, top = (torch.cat(column).cpu().numpy() for column in zip(*pieces, strict=True))
    return Logprobs(chosen=chosen, rank=rank, top_ids=ids, top=top)
