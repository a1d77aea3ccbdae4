"""SchedulerConfig: limits and policy of one scheduler. Built by core/start.py from what resolve() worked out."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.step import Bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Raises ConfigError naming the field.

    token_buckets, row_buckets: ascending padded sizes; the smallest that fits is chosen. () = exact sizes.
    aging_steps: with policy "priority", one class higher is worth a head start of this many steps, so that nobody waits
        for ever behind later arrivals of a higher class (S-5).
    max_preemptions: a request preempted this often reserves all the pages it may need before it runs again.
    max_prefix_skips: most waiting requests that one step passes by because their next unit is being computed.
    max_num_steps: most decode turns that a step takes on the device when nothing waits. max_turn_rows: most rows of it.
    max_prompt_logprob_tokens: most prompt positions scored in one step: bounds the logits workspace.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    token_buckets: tuple[int, ...] = ()
    row_buckets: tuple[int, ...] = ()
    policy: str = "fcfs"  # fcfs | priority
    long_prefill_token_threshold: int = 0  # most prompt tokens of one request in a step, 0 = no limit
    enable_prefix_caching: bool = True
    max_in_flight: int = 2
    max_num_steps: int = 1
    max_turn_rows: int = 1 << 20
    vocab_size: int
    max_logprobs: int = 20
    max_prompt_logprob_tokens: int = 1024
    max_waiting: int = 1 << 20
    max_stop_ids: int = 128
    max_logit_bias: int = 1024
    max_bad_words: int = 128  # token sequences a request
    max_bad_word_len: int = 16  # tokens a sequence
    aging_steps: int = 1024
    max_preemptions: int = 8
    max_prefix_skips: int = 32

    def __post_init__(self) -> None:
        positive = ("max_num_seqs", "max_model_len", "max_in_flight", "vocab_size", "aging_steps", "max_waiting")
        for name in (*positive, "max_num_steps", "max_prompt_logprob_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not accepted; expected an integer >= 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is less than max_num_seqs "
                f"{self.max_num_seqs}; a step must fit one token of each"
            )
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"policy: {self.policy!r} is not known; fcfs or priority")
        check_buckets("token_buckets", self.token_buckets, self.max_num_batched_tokens)
        check_buckets("row_buckets", self.row_buckets, self.max_num_seqs)

    @property
    def max_chunk(self) -> int:
        """Most prompt tokens of one request in a step."""
        threshold = self.long_prefill_token_threshold
        return min(threshold, self.max_num_batched_tokens) if threshold > 0 else self.max_num_batched_tokens

    @property
    def max_span(self) -> int:
        """Most tokens that a row's steps in flight span: a window keeps the pages of all of them."""
        turns = 1 if self.max_num_steps == 1 else self.max_in_flight * self.max_num_steps
        return max(self.max_chunk, turns)


def check_buckets(name: str, buckets: tuple[int, ...], largest: int) -> None:
    if buckets and (list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] < largest):
        raise ConfigError(f"{name}: {buckets} is not accepted; expected ascending sizes, the last at least {largest}")


def smallest_fit(buckets: tuple[int, ...], size: int) -> int:
    at = bisect_left(buckets, size)
    return buckets[at] if at < len(buckets) else size


def choose_bucket(config: SchedulerConfig, num_tokens: int, num_rows: int) -> Bucket:
    return Bucket(
        tokens=smallest_fit(config.token_buckets, num_tokens), rows=smallest_fit(config.row_buckets, num_rows)
    )
