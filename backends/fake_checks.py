"""What can be said of a StepPlan by looking at it alone: shapes, ranges, buckets, capabilities. Raises InternalError.

Called by backends/fake.py at submit. Conditions that need the device's tables are in fake_device.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

import numpy as np

from engine.errors import check
from engine.plan_rules import check_replicas
from engine.runner import Capability, RunnerConfig
from engine.specs.cache import CacheLayout
from engine.step import Drafts, OpenedRows, Sampler, StepPlan, query_starts


def check_plans(
    plans: Sequence[StepPlan], config: RunnerConfig, layout: CacheLayout, capabilities: frozenset[Capability]
) -> None:
    """Those of all replicas."""
    check_replicas(plans, config)
    for plan in plans:
        check_plan(plan, config, layout, capabilities)


def check_plan(plan: StepPlan, config: RunnerConfig, layout: CacheLayout, capabilities: frozenset[Capability]) -> None:
    """Everything that does not depend on the device's tables."""
    check_capabilities(plan, capabilities)
    check_rows(plan, config)
    check_bucket(plan, config)
    check_sampling(plan, config)
    check(len(plan.page_deltas) in (0, len(layout.groups)), f"{len(plan.page_deltas)} page deltas")
    for group, delta in enumerate(plan.page_deltas):
        if delta is not None:
            check(
                len(delta.slots) == len(delta.columns) == len(delta.pages) > 0, f"page delta of group {group} is empty"
            )
            check_slots(delta.slots, config, f"page delta of group {group}")
            places = delta.slots.astype(np.int64) << 32 | delta.columns
            check(len(np.unique(places)) == len(places), f"page delta of group {group} sets an entry twice")
    if plan.opened is not None:
        check_opened(plan.opened, config)
    if plan.closed is not None:
        check_slots(plan.closed, config, "closed")
        check(len(np.unique(plan.closed)) == len(plan.closed), "a slot is closed twice")
    if plan.copies is not None:
        check((plan.copies.pool >= 0).all() and (plan.copies.pool < len(layout.pools)).all(), "copy in an unknown pool")
    if plan.drafts is not None:
        check_drafts(plan, plan.drafts)


def check_capabilities(plan: StepPlan, capabilities: frozenset[Capability]) -> None:
    """A part that the runner has not announced is refused, not ignored."""
    for used, capability in (
        (plan.late_mask, Capability.LATE_MASK),
        (plan.num_steps != 1, Capability.MULTI_STEP),
        (plan.drafts is not None, Capability.DRAFTS),
        (plan.drafts is not None and plan.drafts.parents is not None, Capability.DRAFT_TREE),
        (plan.states is not None, Capability.STATE),
        (plan.encodes is not None, Capability.CROSS),
        (plan.transfers is not None, Capability.TRANSFERS),
        (plan.prompt_logprobs is not None, Capability.PROMPT_LOGPROBS),
        (plan.pooling is not None, Capability.POOLING),
    ):
        check(not used or capability in capabilities, f"step {plan.step_id}: {capability.value} was not announced")
    check(plan.adapter_slots is None, f"step {plan.step_id}: adapters were not announced")
    late = plan.late_mask
    check(not (late and (plan.num_steps > 1 or plan.drafts is not None)), "a late mask takes one turn, without drafts")
    check(
        not (plan.drafts is not None and plan.states is not None), "drafts with recurrent states: not in the contract"
    )


def check_slots(slots: np.ndarray, config: RunnerConfig, what: str) -> None:
    check(slots.dtype == np.int32, f"{what}: slots are {slots.dtype}, not int32")
    check(not len(slots) or (slots.min() >= 0 and slots.max() < config.max_slots), f"{what}: slots {slots.tolist()}")


def check_rows(plan: StepPlan, config: RunnerConfig) -> None:
    for name in (
        "slots",
        "generation",
        "num_computed",
        "num_new",
        "num_logits",
        "token_ids",
        "positions",
        "logit_rows",
    ):
        check(getattr(plan, name).dtype == np.int32, f"{name} is {getattr(plan, name).dtype}, not int32")
    for name in ("generation", "num_computed", "num_new", "num_logits"):
        check(getattr(plan, name).shape == plan.slots.shape, f"{name} has shape {getattr(plan, name).shape}")
    check_slots(plan.slots, config, "rows")
    check(len(np.unique(plan.slots)) == plan.num_rows, f"a slot has two rows: {plan.slots.tolist()}")
    check((plan.num_new >= 1).all() and (plan.num_computed >= 0).all(), "num_new < 1 or num_computed < 0")
    check(int(plan.num_new.sum()) == plan.num_tokens, f"{plan.num_tokens} tokens, num_new sums to {plan.num_new.sum()}")
    check(plan.positions.ndim == 2 and plan.positions.shape[1] == plan.num_tokens, f"positions {plan.positions.shape}")
    longest = int((plan.num_computed + plan.num_new).max(initial=0)) + plan.num_steps - 1
    check(longest <= config.max_model_len, f"a row of {longest} tokens, the model length is {config.max_model_len}")
    wanted = np.arange(len(plan.logit_rows), dtype=np.int32)
    check(len(plan.logit_rows) == plan.num_logits.sum(), "logit_rows and num_logits disagree")
    # each row scores its last num_logits tokens
    ends = query_starts(plan)[1:]
    wanted += np.repeat(ends - np.cumsum(plan.num_logits), plan.num_logits)
    check((plan.logit_rows == wanted).all(), "logit_rows are not the last num_logits tokens of their rows")


def check_bucket(plan: StepPlan, config: RunnerConfig) -> None:
    for name, used, size, sizes in (
        ("tokens", plan.num_tokens, plan.bucket.tokens, config.token_buckets),
        ("rows", plan.num_rows, plan.bucket.rows, config.row_buckets),
    ):
        check(used <= size, f"step {plan.step_id}: {used} {name} in a bucket of {size}")
        check(not sizes or size in sizes, f"step {plan.step_id}: {size} {name} is none of the buckets {sizes}")


def check_sampling(plan: StepPlan, config: RunnerConfig) -> None:
    sampling = bool((plan.num_logits > 0).any())
    check(
        sampling == (plan.sampler is not Sampler.NONE),
        f"sampler {plan.sampler.name} with {plan.num_logits.sum()} logits",
    )
    most = config.sampler_limits.max_logprobs
    check(-1 <= plan.num_logprobs <= most, f"num_logprobs {plan.num_logprobs}, the limit is {most}")
    plain = plan.num_steps == 1 or bool((plan.num_new == 1).all() and (plan.num_logits == 1).all())
    most_steps = config.max_num_steps
    check(plan.num_steps <= most_steps, f"{plan.num_steps} turns, configured were {most_steps}")
    check(plan.num_steps == 1 or plan.num_rows <= config.max_turn_rows, f"several turns of {plan.num_rows} rows")
    check(plan.num_steps >= 1 and plain, "several turns need one new token and one logit row in every row")
    check(plan.num_steps == 1 or (plan.drafts is None and plan.prompt_logprobs is None), "several turns with extras")
    if plan.prompt_logprobs is not None:
        wanted = plan.prompt_logprobs
        check(wanted.token_idx.shape == wanted.targets.shape, "prompt logprobs: targets and token_idx disagree")
        inside = (wanted.token_idx >= 0) & (wanted.token_idx < plan.num_tokens)
        check(inside.all() and 0 <= wanted.num_top <= most, "prompt logprobs outside the step, or too many")


def check_opened(opened: OpenedRows, config: RunnerConfig) -> None:
    check_slots(opened.slots, config, "opened")
    check(len(opened.slots) == len(opened.generation) == len(opened.num_computed) > 0, "opened rows: unequal lengths")
    limits, table = config.sampler_limits, opened.sampling
    for name, ragged, most in (
        ("stop_ids", table.stop_ids, limits.max_stop_ids),
        ("bias_ids", table.bias_ids, limits.max_logit_bias),
    ):
        if ragged is not None:
            check(len(ragged.starts) == len(opened.slots) + 1, f"{name}: {len(ragged.starts)} starts")
            longest = int(np.diff(ragged.starts).max(initial=0))
            check(longest <= most, f"{name}: {longest} ids in a row, the limit is {most}")
    if table.bad_words is not None and table.bad_word_starts is not None:
        check(int(np.diff(table.bad_word_starts).max(initial=0)) <= limits.max_bad_words, "too many bad words")
        check(int(np.diff(table.bad_words.starts).max(initial=0)) <= limits.max_bad_word_len, "a bad word is too long")


def check_drafts(plan: StepPlan, drafts: Drafts) -> None:
    d = drafts.num_drafts
    check(d.shape == plan.slots.shape and (d >= 0).all(), "num_drafts: one count a row")
    drafted = d > 0
    check((plan.num_new[drafted] == 1 + d[drafted]).all(), "a row with d drafts has num_new == 1 + d")
    check((plan.num_logits[drafted] == 1 + d[drafted]).all(), "a row with d drafts has num_logits == 1 + d")
    check((plan.num_logits[~drafted] <= 1).all(), "a row without drafts has at most one logit row")
    if drafts.parents is not None:
        check(
            drafts.parents.shape[0] == plan.num_rows and drafts.parents.shape[1] >= d.max(initial=0), "parents: shape"
        )


def fingerprint(part: object) -> int:
    """A checksum of all arrays and values of a plan."""
    if isinstance(part, np.ndarray):
        return zlib.crc32(part.tobytes())
    if is_dataclass(part):
        return zlib.crc32(repr([fingerprint(getattr(part, f.name)) for f in fields(part)]).encode())
    if isinstance(part, tuple):
        return zlib.crc32(repr([fingerprint(x) for x in part]).encode())
    return zlib.crc32(repr(part).encode())
