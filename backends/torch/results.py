"""From device tensors to a StepResult: one copy to the host for what the engine waits for.

Letters: S rows · L sampling rows · M scored prompt tokens · k top entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.errors import fail
from engine.step import I32, Logprobs, PromptLogprobs, RowError, StepPlan, StepResult

Scores = tuple[Tensor, Tensor, Tensor, Tensor]
"""chosen f32 [n], rank i32 [n], top ids i32 [n, k], top f32 [n, k]"""


@dataclass(slots=True)
class Outcome:
    """What a step left on the device."""

    logits: Tensor  # f32 [L, V]
    bad: Tensor  # bool [S] rows whose token ids were clamped
    broken: Tensor | None = None  # bool [S] rows with a hidden state not finite at any token; None: the logits tell
    prompt_scores: list[Scores] = field(default_factory=list)
    packed: Tensor | None = None  # integers on the host: tokens [L], non-finite logits [L], bad [S], broken [S]
    starts: tuple[int, ...] = ()  # where the parts begin in packed
    scores: Scores | None = None
    ready: torch.cuda.Event | None = None

    def finish(self, tokens: Tensor, largest: Tensor, scores: Scores | None) -> None:
        """Begin the copy to the host. tokens: i64 [L]; largest: f32 [L] of each row's logits, NaN if any is."""
        unfit = ~(largest < torch.inf)  # +inf and NaN are not less than +inf; -inf is lawful
        parts = [tokens, unfit.long(), self.bad.long()]
        if self.broken is not None:
            parts.append(self.broken.long())
        self.scores = scores
        count = len(tokens)
        self.send(torch.cat(parts).to("cpu", non_blocking=True), (0, count, 2 * count, 2 * count + len(self.bad)))

    def send(self, packed: Tensor, starts: tuple[int, ...]) -> None:
        """packed is on its way from the device of the logits."""
        self.packed, self.starts = packed, starts
        if self.logits.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()


def read_result(plan: StepPlan, sampling_rows: I32, poisoned: I32, outcome: Outcome) -> StepResult:
    """Wait for the device. Raises what the device raised."""
    if outcome.ready is not None:
        outcome.ready.synchronize()
    if outcome.packed is None:
        fail(f"step {plan.step_id} did not sample")
    packed, (token_at, unfit_at, bad_at, *broken_at) = outcome.packed.cpu().numpy(), outcome.starts
    count, rows = len(sampling_rows), plan.num_rows
    num_sampled, scored = np.zeros(rows, np.int32), plan.prompt_logprobs
    tokens = np.zeros((rows, 1), np.int32)
    error = np.zeros(rows, np.uint8)
    num_sampled[sampling_rows] = 1
    tokens[sampling_rows, 0] = packed[token_at : token_at + count]
    error[sampling_rows[packed[unfit_at : unfit_at + count] != 0]] = RowError.NON_FINITE
    if outcome.broken is not None:
        error[packed[broken_at[0] : broken_at[0] + rows] != 0] = RowError.NON_FINITE
    error[packed[bad_at : bad_at + rows] != 0] = RowError.BAD_TOKEN_ID
    error[poisoned] = RowError.BAD_TOKEN_ID
    return StepResult(
        step_id=plan.step_id,
        num_sampled=num_sampled,
        tokens=tokens,
        error=error,
        logprobs=None if outcome.scores is None else spread(outcome.scores, sampling_rows, rows, plan.num_logprobs),
        prompt_logprobs=gather(outcome.prompt_scores, scored) if scored is not None and outcome.prompt_scores else None,
    )


def spread(scores: Scores, rows: I32, num_rows: int, num_top: int) -> Logprobs:
    """Scores of the sampling rows, put at their rows. What is padded is cut here, on the host."""
    chosen, rank, ids, top = (part.cpu().numpy()[: len(rows), ...] for part in scores)
    ids, top = ids[:, :num_top], top[:, :num_top]
    result = Logprobs(
        chosen=np.zeros(num_rows, np.float32),
        rank=np.zeros(num_rows, np.int32),
        top_ids=np.full((num_rows, ids.shape[1]), -1, np.int32),
        top=np.full((num_rows, ids.shape[1]), -np.inf, np.float32),
    )
    result.chosen[rows], result.rank[rows], result.top_ids[rows], result.top[rows] = chosen, rank, ids, top
    return result


def gather(pieces: list[Scores], wanted: PromptLogprobs) -> Logprobs:
    """Scores of prompt tokens, piece after piece; the last may be padded."""
    columns = (torch.cat([part.cpu() for part in column]).numpy() for column in zip(*pieces, strict=True))
    chosen, rank, ids, top = (column[: len(wanted.targets)] for column in columns)
    return Logprobs(chosen=chosen, rank=rank, top_ids=ids[:, : wanted.num_top], top=top[:, : wanted.num_top])
