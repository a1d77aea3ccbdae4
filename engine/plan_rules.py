"""What a plan must be like for a runner that announces neither drafts nor state: refused otherwise.

Raises InternalError: the engine makes plans, a wrong one is our own bug. Called by backends/{jax,torch} at submit;
`check_replicas` by the fake too.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import check, fail
from engine.runner import RunnerConfig
from engine.step import StepPlan


def check_plan(plan: StepPlan, config: RunnerConfig) -> None:
    """Parts that were not announced, sizes that do not agree, slots and lengths beyond what was configured."""
    step = f"step {plan.step_id}"
    for used, name in (
        (plan.drafts is not None, "drafts"),
        (plan.states is not None, "state"),
        (plan.encodes is not None, "cross"),
        (plan.transfers is not None, "transfers"),
        (plan.pooling is not None, "pooling"),
        (plan.adapter_slots is not None, "adapters"),
    ):
        check(not used, f"{step}: {name} was not announced")
    check(1 <= plan.num_steps <= config.max_num_steps, f"{step}: {plan.num_steps} turns of {config.max_num_steps}")
    if plan.num_steps > 1:
        check_turns(plan, config)
    check(int(plan.num_new.sum()) == plan.num_tokens, f"{step}: num_new does not sum to {plan.num_tokens} tokens")
    check(plan.positions.shape == (1, plan.num_tokens), f"{step}: positions {plan.positions.shape}; expected one axis")
    check(not plan.num_rows or int(plan.num_logits.max()) <= 1, f"{step}: several logits a row, without drafts")
    check(len(plan.logit_rows) == int(plan.num_logits.sum()), f"{step}: logit_rows and num_logits disagree")
    limit = config.sampler_limits.max_logprobs
    check(-1 <= plan.num_logprobs <= limit, f"{step}: {plan.num_logprobs} logprobs, the limit is {limit}")
    if plan.prompt_logprobs is not None:
        scored = plan.prompt_logprobs
        check(scored.token_idx.shape == scored.targets.shape, f"{step}: prompt logprobs of unequal lengths")
        check(0 <= scored.num_top <= limit, f"{step}: {scored.num_top} prompt logprobs, the limit is {limit}")
    if plan.num_rows:
        slots, longest = plan.slots, int((plan.num_computed + plan.num_new).max()) + plan.num_steps - 1
        if slots.min() < 0 or slots.max() >= config.max_slots:
            fail(f"{step}: slots {slots.tolist()}, expected [0, {config.max_slots})")
        check(longest <= config.max_model_len, f"{step}: a row of {longest}, the limit is {config.max_model_len}")


def check_replicas(plans: Sequence[StepPlan], config: RunnerConfig) -> None:
    """The plans of a step are of one step, one bucket and, where one has several turns, all of decode steps."""
    check(len(plans) == config.num_replicas, f"{len(plans)} plans for {config.num_replicas} replicas")
    first = plans[0]
    several = any(plan.num_steps > 1 for plan in plans)
    for plan in plans:
        same = plan.step_id == first.step_id and plan.bucket == first.bucket
        check(same, "replicas differ in step_id or bucket")
        if several:
            check_turns(plan, config)


def check_turns(plan: StepPlan, config: RunnerConfig) -> None:
    """Several turns are those of decode steps."""
    step = f"step {plan.step_id}"
    check(bool((plan.num_new == 1).all() and (plan.num_logits == 1).all()), f"{step}: several turns of other rows")
    check(plan.num_rows <= config.max_turn_rows, f"{step}: several turns of {plan.num_rows} rows")
    check(not plan.late_mask and plan.prompt_logprobs is None, f"{step}: several turns with a mask or prompt logprobs")


def check_buckets(plan: StepPlan, config: RunnerConfig) -> None:
    """The plan's bucket is one that was compiled, and holds the plan."""
    for name, used, size, sizes in (
        ("tokens", plan.num_tokens, plan.bucket.tokens, config.token_buckets),
        ("rows", plan.num_rows, plan.bucket.rows, config.row_buckets),
    ):
        check(used <= size, f"step {plan.step_id}: {used} {name} in a bucket of {size}")
        check(size in sizes, f"step {plan.step_id}: no bucket of {size} {name}")
