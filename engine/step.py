"""The whole engine <-> runner wire format: what runs in one step, and what came of it.

The scheduler builds a StepPlan, the executor hands it to every runner process unchanged, a runner answers with a
StepResult. Everything here is ints and numpy; no framework, no request object. docs/contract.md has the rules in prose,
backends/fake.py has them as checks.

Always true:
* A plan's arrays are not written between `submit` and the end of its `collect`; after that they may be (ring buffers).
* Lengths in a plan are upper bounds. The device's own `length[slot]` and `last_token[slot]` are the truth, and every
  kernel clamps by them. They are exact unless drafts or several turns are in flight.
* An optional part that no row uses is None: absent, not empty.
* Order in a step: closed, opened, page_deltas, transfers begin, copies, encodes, forward, (late mask,) sampling.

Letters: T tokens in the step · S rows in the step · L logit rows · V vocabulary (architecture.md section 6). Arrays in
a plan have their true sizes; the runner pads them to `bucket`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from engine.errors import check

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

LAST_TOKEN: Final = -1
"""In `StepPlan.token_ids`: use the device's own `last_token[slot]` of this row."""


def draft_token(index: int) -> int:
    """In `StepPlan.token_ids`: use the device's own draft number `index` (from 0) of this row."""
    return -2 - index


NULL_PAGE: Final = 0
"""Page 0 of every pool: takes padded writes, is never read, is never allocated."""


class Sampler(IntEnum):
    """Which sampling program a plan needs: the weakest one that serves all of its sampling rows."""

    NONE = 0  # no row samples (all rows are unfinished prefill chunks)
    GREEDY = 1  # argmax of the raw logits; no row uses any table
    FULL = 2  # processors, temperature, top-k/p, min-p, seeds


class RowError(IntEnum):
    """Per-row device error flags in StepResult.error (R3 of hardening.md)."""

    NONE = 0
    BAD_TOKEN_ID = 1  # a token id outside [0, V) reached the device; it was clamped
    NON_FINITE = 2  # NaN or +inf in the row's logits
    TRANSFER_FAILED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Padded sizes of a step, chosen by the engine, equal on all ranks and replicas."""

    tokens: int  # T, >= the plan's token count
    rows: int  # S, >= the plan's row count


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A list of int lists as one array: list i is values[starts[i] : starts[i + 1]]."""

    values: I32  # [sum of lengths]
    starts: I32  # [n + 1], starts[0] == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTable:
    """Sampling state of the rows that a plan opens, one entry a row, struct of arrays.

    `temperature == 0` means greedy. Order of operations: docs/contract.md, section Sampling.
    """

    temperature: F32  # [n]
    top_p: F32  # [n] in (0, 1]
    min_p: F32  # [n] in [0, 1]
    top_k: I32  # [n], 0 = off
    presence_penalty: F32  # [n]
    frequency_penalty: F32  # [n]
    repetition_penalty: F32  # [n] > 0, 1 = off
    seed: U64  # [n], drawn at admission when the request gave none
    num_outputs: I32  # [n] tokens already generated (0, or more when a preempted request comes back)
    min_tokens: I32  # [n] stop ids are banned while fewer than this many tokens are generated
    max_outputs: I32  # [n] a device that runs several turns stops the row after this many outputs
    num_logprobs: I32  # [n] top logprobs wanted, -1 = none, 0 = the sampled token's alone
    stop_ids: Ragged  # [n] ids that end the row (eos and stop_token_ids), for min_tokens and for num_steps > 1
    bias_ids: Ragged | None = None  # [n] logit_bias ids
    bias_values: F32 | None = None  # [len(bias_ids.values)]
    allowed_ids: Ragged | None = None  # [n] empty list = everything is allowed
    bad_words: Ragged | None = None  # flattened token sequences of all rows; rows' ranges in bad_word_starts
    bad_word_starts: I32 | None = None  # [n + 1]: row i owns sequences [starts[i], starts[i + 1]) of bad_words
    history: Ragged | None = None  # [n] prompt + generated ids so far; only of rows that use penalties or bad words
    num_prompt: I32 | None = None  # [n] how many ids of `history` are prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRows:
    """Rows of the persistent device tables that begin a new tenancy in this step (before anything else runs).

    The runner clears whatever the slot's former tenant left (S-14) and sets length[slot] = num_computed. generation
    is >= 0 and differs from the slot's former one; the slot need not have been closed.
    """

    slots: I32  # [n]
    generation: I32  # [n]
    num_computed: I32  # [n] tokens whose KV is already in the pages (prefix hit, remote load, resumed)
    sampling: SamplingTable


@dataclass(frozen=True, slots=True, kw_only=True)
class PageDelta:
    """Changes to one group's page table, applied before the forward pass: table[slots[i], columns[i]] = pages[i].

    Never empty (None instead), and no entry is set twice in a step.
    Column c holds tokens [c * page, (c + 1) * page) of its sequence. Pages behind a window may keep stale ids on the
    device: no kernel reads behind the window.
    """

    slots: I32  # [n]
    columns: I32  # [n]
    pages: I32  # [n]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopies:
    """Copies inside a pool, run before any write of the step: the first `tokens[i]` tokens of a page, in all layers.

    No target is a source, or a target twice, in one step.
    """

    pool: I32  # [n]
    source: I32  # [n]
    target: I32  # [n]
    tokens: I32  # [n]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Logprobs of prompt tokens: entry i scores id `targets[i]` with the logits of token `token_idx[i]` of the step."""

    token_idx: I32  # [M] index into [0, T)
    targets: I32  # [M] the prompt id that follows
    num_top: int  # top entries a position, 0 = the target's alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """Speculative tokens. A row with d drafts has num_new = num_logits = 1 + d; its last d tokens are the drafts.

    parents None = a chain. Else parents[r, i] < i is the draft that draft i follows, -1 = the last token (a tree);
    positions then hold num_computed + depth, and the runner moves the accepted path's KV together. The tokens that come
    out are those of plain decoding: each node samples as its output index does, and the walk goes on at the child that
    holds the sampled id.
    """

    num_drafts: I32  # [S]
    parents: I32 | None = None  # [S, max drafts]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSlots:
    """Recurrent-state rows of a state group's pool: read before, written after this step's tokens.

    Equal when no checkpoint is taken. Rows of a step write different states; a state that is read only is a checkpoint
    and may serve many rows.
    """

    group: int
    read: I32  # [S], -1 = start from zeros
    write: I32  # [S]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEncodes:
    """Encoder runs whose outputs fill pages of a cross group; the pages are then read by rows, never written again."""

    group: int
    media_id: I64  # [n] index of the media payload handed to the runner beforehand
    pages: Ragged  # [n] pages that take the encoder output, in order
    num_tokens: I32  # [n] encoder output length


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    """Asynchronous page moves (remote load, offload): begun with this step, reported in a result or by poll()."""

    transfer_id: I64  # [n]
    kind: U8  # [n] 0 = load into pages, 1 = store from pages
    pool: I32  # [n]
    pages: Ragged  # [n]
    source: tuple[str, ...] = ()  # [n] connector handles


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of one replica. Rows and tokens are in the same order: row r owns num_new[r] consecutive tokens."""

    step_id: int
    bucket: Bucket
    num_steps: int = 1  # k decode turns on the device; > 1 only when every row has num_new == 1 and samples
    # rows, in order
    slots: I32  # [S]
    generation: I32  # [S]
    num_computed: I32  # [S] upper bound of length[slot]: tokens before this step's
    num_new: I32  # [S] >= 1
    num_logits: I32  # [S] 0 = more prompt to come, 1 = samples, 1 + d with drafts
    # tokens
    token_ids: I32  # [T] ids the host knows, else LAST_TOKEN or draft_token(i)
    positions: I32  # [axes, T] num_computed + i (tree drafts: + depth); axes == 1 except for multi-axis rope
    logit_rows: I32  # [L] token indexes that are scored for sampling: the last num_logits of each row, rows in order
    sampler: Sampler = Sampler.GREEDY
    num_logprobs: int = -1  # most top logprobs any sampling row wants, -1 = none
    # device tables
    opened: OpenedRows | None = None
    closed: I32 | None = None  # slots whose tenancy ended
    page_deltas: tuple[PageDelta | None, ...] = ()  # one per group; () when no group changes
    copies: PageCopies | None = None
    # optional parts, None when no row uses them
    late_mask: bool = False  # forward only; provide_mask releases sampling
    prompt_logprobs: PromptLogprobs | None = None
    drafts: Drafts | None = None
    adapter_slots: I32 | None = None  # [S] 0 = no adapter
    states: tuple[StateSlots, ...] | None = None
    encodes: CrossEncodes | None = None
    transfers: Transfers | None = None
    pooling: I32 | None = None  # [S] pooling kind per row, 0 = none

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Natural-log probabilities of chosen tokens and of the most likely ones, before any processor (raw_logprobs)."""

    chosen: F32  # [n] log p of the chosen token
    rank: I32  # [n] 1 = the most likely
    top_ids: I32  # [n, k], most likely first; -1 pads
    top: F32  # [n, k]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced, rows in the plan's order. max_new is num_steps, or 1 + the most drafts of a row, or 1.

    The arrays belong to the engine: the runner never writes them again. Right of num_sampled nothing has a meaning.
    """

    step_id: int
    num_sampled: I32  # [S] 0 .. max_new
    tokens: I32  # [S, max_new] sampled ids, left aligned
    error: U8  # [S] RowError
    logprobs: Logprobs | None = None  # n = S * max_new, row major; None when the plan wanted none
    prompt_logprobs: Logprobs | None = None  # n = M of the plan's PromptLogprobs
    pooled: F32 | None = None  # [S, width]
    finished_transfers: tuple[int, ...] = ()
    failed_transfers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What poll() reports while no step runs."""

    kind: str  # "transfer_finished" | "transfer_failed"
    transfer_id: int = 0
    detail: str = field(default="")


def query_starts(plan: StepPlan) -> I32:
    """i32 [S + 1]: row r owns tokens [starts[r], starts[r + 1])."""
    starts = np.zeros(len(plan.num_new) + 1, np.int32)
    np.cumsum(plan.num_new, out=starts[1:])
    return starts


def empty_plan(step_id: int, bucket: Bucket) -> StepPlan:
    """A plan without rows: what an idle replica gets, so that collectives stay in step."""
    none = np.zeros(0, np.int32)
    return StepPlan(
        step_id=step_id,
        bucket=bucket,
        slots=none,
        generation=none,
        num_computed=none,
        num_new=none,
        num_logits=none,
        token_ids=none,
        positions=np.zeros((1, 0), np.int32),
        logit_rows=none,
        sampler=Sampler.NONE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkList:
    """Attention of one step as W independent items: a tile of queries of one row against a stretch of its KV.

    Items of one tile stand together, ascending in KV, so that a second pass can merge their partial softmaxes. All
    bounds are the plan's upper bounds: a kernel clamps them by the device's lengths, and an item may prove to be empty.
    """

    row: I32  # [W] row of the plan
    tile: I32  # [W] number of the query tile; the last entry + 1 is how many tiles there are
    query: I32  # [W] index in [0, T) of the tile's first query token
    num_queries: I32  # [W] 1 .. q_tile
    kv_begin: I32  # [W] position of the first KV token, a multiple of page_tokens
    kv_end: I32  # [W] one past the last, <= the position that the tile's last query sees, + 1

    @property
    def num_items(self) -> int:
        return len(self.row)


def work_list(
    plan: StepPlan, q_tile: int, kv_tile: int, page_tokens: int, window: int | None = None, slack: int = 0
) -> WorkList:
    """The causal attention work of a plan in one group: query tiles x KV stretches (split-KV), rows in order.

    q_tile: most query tokens an item. kv_tile: most KV tokens an item, a multiple of page_tokens. window: a query at
    position p sees (p - window, p]. slack: by how many tokens num_computed may exceed the device's length (steps with
    drafts or several turns not yet collected): the window of the true position begins that much earlier.
    """
    check(q_tile >= 1 and page_tokens >= 1 and slack >= 0, f"work_list: tiles of {q_tile}, pages of {page_tokens}")
    check(kv_tile >= 1 and kv_tile % page_tokens == 0, f"work_list: kv_tile {kv_tile} is no multiple of {page_tokens}")
    tiles = -(-plan.num_new // q_tile)  # [S]
    row = np.repeat(np.arange(plan.num_rows, dtype=np.int32), tiles)
    nth = np.arange(len(row), dtype=np.int32) - np.repeat(np.cumsum(tiles) - tiles, tiles).astype(np.int32)
    first = nth * q_tile  # of the row's new tokens
    count = np.minimum(q_tile, plan.num_new[row] - first)
    # a further turn on the device adds one token to see
    end = plan.num_computed[row] + first + count + (plan.num_steps - 1)
    begin = np.zeros_like(end)
    if window is not None:
        oldest = plan.num_computed[row] + first - slack - (window - 1)  # - 1: a query sees itself
        begin = np.maximum(0, oldest) // page_tokens * page_tokens
    splits = -(-(end - begin) // kv_tile)
    item = np.repeat(np.arange(len(row), dtype=np.int32), splits)
    part = np.arange(len(item), dtype=np.int32) - np.repeat(np.cumsum(splits) - splits, splits).astype(np.int32)
    kv_begin = begin[item] + part * kv_tile
    return WorkList(
        row=row[item],
        tile=item,
        query=(query_starts(plan)[row] + first)[item].astype(np.int32),
        num_queries=count[item].astype(np.int32),
        kv_begin=kv_begin.astype(np.int32),
        kv_end=np.minimum(kv_begin + kv_tile, end[item]).astype(np.int32),
    )
