"""What a step gave, as messages to the clients: columns of raw bytes, the figures of the schedulers."""

from __future__ import annotations

from engine.core.messages import LogprobColumns, SchedulerStats, StepOutputs
from engine.scheduler.stats import SchedulerGauges
from engine.scheduler.update import StepColumns
from engine.step import Logprobs


def scheduler_stats(gauges: SchedulerGauges) -> SchedulerStats:
    return SchedulerStats(
        num_running=gauges.num_running,
        num_waiting=gauges.num_waiting,
        kv_usage=gauges.kv_usage,
        prefix_queries=gauges.prefix_queries,
        prefix_hits=gauges.prefix_hits,
        num_preemptions=gauges.num_preemptions,
        step=gauges.step,
    )


def encode_columns(columns: StepColumns, stats: SchedulerStats) -> StepOutputs:
    """Arrays to raw bytes; nothing is looked at one by one."""
    return StepOutputs(
        keys=columns.keys.tobytes(),
        counts=columns.counts.tobytes(),
        tokens=columns.tokens.tobytes(),
        finish=columns.finish.tobytes(),
        stop_token=columns.stop_token.tobytes(),
        num_cached=columns.num_cached.tobytes(),
        logprobs=None if columns.logprobs is None else encode_logprobs(columns.logprobs),
        prompt_logprobs={key: encode_logprobs(value) for key, value in columns.prompt_logprobs.items()} or None,
        stats=stats,
    )


def encode_logprobs(logprobs: Logprobs) -> LogprobColumns:
    return LogprobColumns(
        chosen=logprobs.chosen.tobytes(),
        rank=logprobs.rank.tobytes(),
        top_ids=logprobs.top_ids.tobytes(),
        top=logprobs.top.tobytes(),
        k=logprobs.top_ids.shape[1],
    )
