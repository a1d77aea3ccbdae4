"""OutputProcessor: the core's StepOutputs into text, logprobs and RequestOutputs; who is done, and what to abort.

Owned by one front end (llm.py or async_engine.py), used from one thread. Nothing is built until somebody reads:
tokens gather in the request's state and `take` makes one RequestOutput of all that is new, so that a slow reader
costs no more memory than its tokens (F-4). Cost per token is bounded.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import numpy as np

from engine.core.messages import FromCore, LogprobColumns, RequestFailed, SchedulerStats, StepOutputs
from engine.errors import InvalidValue, NeverFits, NotFinished, Overloaded, RequestError, Unsupported
from engine.frontend.detokenizer import Decoder, Detokenizer, PieceDecoder, WindowDecoder
from engine.frontend.input import PreparedRequest
from engine.frontend.results import CompletionOutput, Logprob, LogprobsAt, RequestOutput, RequestStateStats
from engine.frontend.tokenizer import Tokenizer
from engine.metrics.stats import FinishedRequest, IterationStats
from engine.params import RequestOutputKind, SamplingParams
from engine.request import FinishReason

log = logging.getLogger("twinfer.output")

BYTES_PER_TOKEN = 8
BYTES_PER_LOGPROB = 96
ERROR_TYPES: dict[str, type[RequestError]] = {
    cls.code: cls for cls in (InvalidValue, NeverFits, Unsupported, Overloaded)
}


@dataclass(slots=True)
class SequenceState:
    """One of a request's n sequences. Lists hold what was not taken yet (DELTA) or everything."""

    index: int
    detokenizer: Detokenizer | None
    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""  # taken from the detokenizer; everything so far unless the kind is DELTA
    logprobs: list[LogprobsAt] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    last_token_time: float = 0.0
    fresh: bool = False  # has something that was not taken


class RequestState:
    """A request that somebody waits for."""

    def __init__(self, request: PreparedRequest, request_id: str, key: int, sequences: list[SequenceState]) -> None:
        self.request = request
        self.request_id = request_id
        self.key = key
        self.kind = request.params.output_kind
        self.sequences = sequences
        self.unfinished = len(sequences)
        self.prompt_logprobs: list[LogprobsAt | None] | None = None
        self.num_cached: int | None = None
        self.error: Exception | None = None
        self.times = RequestStateStats(arrival_time=request.arrival)
        self.unread_bytes = 0  # of a DELTA stream
        self._closed = False  # the last output was taken

    @property
    def finished(self) -> bool:
        return self.unfinished == 0

    @property
    def keys(self) -> range:
        return range(self.key, self.key + len(self.sequences))

    def take(self) -> RequestOutput | None:
        """All that is new since the last call, or None. Raises the request's error. Ends with `finished` once."""
        if self.error is not None:
            raise self.error
        if self._closed or (self.kind is RequestOutputKind.FINAL_ONLY and not self.finished):
            return None
        chosen = self.sequences if self.kind is RequestOutputKind.FINAL_ONLY else [s for s in self.sequences if s.fresh]
        if not chosen and not self.finished:
            return None
        self._closed = self.finished
        outputs = [completion(sequence, self.kind) for sequence in chosen]
        prompt_logprobs = self.prompt_logprobs
        if self.kind is RequestOutputKind.DELTA:
            self.prompt_logprobs = None
            self.unread_bytes = 0
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=self.finished,
            metrics=self.times,
            num_cached_tokens=self.num_cached,
        )


def completion(sequence: SequenceState, kind: RequestOutputKind) -> CompletionOutput:
    """What a reader gets of one sequence; a DELTA is forgotten by being read."""
    text = "" if sequence.detokenizer is None else sequence.detokenizer.take()
    if kind is RequestOutputKind.DELTA:
        token_ids, logprobs = sequence.token_ids, sequence.logprobs
        sequence.token_ids = []
        sequence.logprobs = None if logprobs is None else []
    else:
        sequence.text = text = sequence.text + text
        token_ids = sequence.token_ids.copy()
        logprobs = None if sequence.logprobs is None else sequence.logprobs.copy()
    sequence.fresh = False
    return CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=sequence.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


@dataclass(slots=True)
class Processed:
    """What one message, taken in at `now`, changed."""

    now: float = field(default_factory=time.monotonic)
    touched: list[RequestState] = field(default_factory=list)  # readers to wake; more than once where n > 1
    aborts: list[int] = field(default_factory=list)  # keys that the core should stop working on
    iteration: IterationStats = field(default_factory=IterationStats)
    stats: SchedulerStats | None = None


class OutputProcessor:
    """All requests that a front end waits for."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._by_key: dict[int, tuple[RequestState, SequenceState]] = {}
        self.requests: dict[int, RequestState] = {}  # by first key

    def add(self, request: PreparedRequest, request_id: str, key: int) -> RequestState:
        """Wait for a request whose sequences have the keys key .. key + n - 1."""
        params = request.params
        sequences = []
        for index in range(params.n):
            sequence = SequenceState(index, self._detokenizer(request))
            if params.logprobs is not None:
                sequence.logprobs, sequence.cumulative_logprob = [], 0.0
            sequences.append(sequence)
        state = RequestState(request, request_id, key, sequences)
        if params.prompt_logprobs is not None:
            state.prompt_logprobs = [None]
        self.requests[key] = state
        for sequence in sequences:
            self._by_key[key + sequence.index] = (state, sequence)
        return state

    def _detokenizer(self, request: PreparedRequest) -> Detokenizer | None:
        params, tokenizer = request.params, self._tokenizer
        if tokenizer is None or not params.detokenize:
            return None
        hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        context = request.prompt_token_ids
        decoder: Decoder
        if tokenizer.pieces is not None:
            at_start = all(i in tokenizer.special_ids for i in context)
            decoder = PieceDecoder(tokenizer.pieces, hidden, at_start)
        else:
            # as in vLLM, spaces between special tokens only matter where special tokens are shown
            join_special = not (params.skip_special_tokens or params.spaces_between_special_tokens)
            decoder = WindowDecoder(tokenizer, hidden, context, join_special)
        return Detokenizer(decoder, params.stop, params.include_stop_str_in_output, params.min_tokens)

    def forget(self, state: RequestState) -> list[int]:
        """Stop waiting for a request; the keys that the core still works on."""
        keys = [key for key in state.keys if self._by_key.pop(key, None) is not None]
        self.requests.pop(state.key, None)
        return keys

    def abort(self, state: RequestState) -> FinishedRequest | None:
        """End a request from this side: its open sequences finish as "abort". None if it had already ended."""
        if state.finished or state.error is not None:
            return None
        for sequence in state.sequences:
            if sequence.finish_reason is None:
                self._finish(state, sequence, "abort", None)
        return finished_request(state, time.monotonic())

    def fail(self, state: RequestState, error: Exception) -> FinishedRequest | None:
        """End a request with an error for its reader. None if it had already ended."""
        if state.finished or state.error is not None:
            return None
        state.error = error
        return finished_request(state, time.monotonic())

    def process(self, message: FromCore) -> Processed:
        """Take in one message of the core."""
        done = Processed()
        if isinstance(message, StepOutputs):
            self._step(message, done)
        elif isinstance(message, RequestFailed):
            self._failed(message, done)
        return done

    def _failed(self, message: RequestFailed, done: Processed) -> None:
        entry = self._by_key.get(message.key)
        if entry is None:
            return
        state = entry[0]
        error = ERROR_TYPES.get(message.code, NotFinished)(message.message)
        error.code = message.code
        finished = self.fail(state, error)
        if finished is not None:
            done.iteration.finished.append(finished)
        done.aborts += [key for key in self.forget(state) if key != message.key]
        done.touched.append(state)

    def _step(self, message: StepOutputs, done: Processed) -> None:
        done.stats = message.stats
        if message.started:
            self._started(message)
        if message.prompt_logprobs is not None:
            self._prompt_logprobs(message.prompt_logprobs)
        columns = None if message.logprobs is None else Columns(message.logprobs)
        tokens = np.frombuffer(message.tokens, "<i4").tolist()
        at = 0
        for key, count, finish, stop_token, cached in zip(
            np.frombuffer(message.keys, "<i8").tolist(),
            np.frombuffer(message.counts, "<i4").tolist(),
            message.finish,
            np.frombuffer(message.stop_token, "<i4").tolist(),
            np.frombuffer(message.num_cached, "<i4").tolist(),
            strict=True,
        ):
            begin, at = at, at + count
            entry = self._by_key.get(key)
            if entry is None:
                continue  # aborted here while the core was still at it
            state, sequence = entry
            if cached >= 0 and state.num_cached is None:
                state.num_cached = cached
            try:
                if count:
                    note_times(state, sequence, count, done)
                if columns is not None and sequence.logprobs is not None:
                    self._add_logprobs(state, sequence, columns, tokens, begin, at)
                self._push(state, sequence, tokens[begin:at], FinishReason(finish), stop_token, done)
            except Exception:  # the boundary of one request (R1): its fault is its own end, not its neighbours'
                log.exception("request with key %d failed in the front end", key)
                self._fault(state, done)

    def _fault(self, state: RequestState, done: Processed) -> None:
        finished = self.fail(state, NotFinished("internal error while the answer was put together"))
        if finished is not None:
            done.iteration.finished.append(finished)
        done.aborts += self.forget(state)
        done.touched.append(state)

    def _started(self, message: StepOutputs) -> None:
        keys = np.frombuffer(message.started, "<i8").tolist()
        for key, when in zip(keys, np.frombuffer(message.started_s, "<f8").tolist(), strict=True):
            entry = self._by_key.get(key)
            if entry is not None and entry[0].times.first_scheduled_time is None:
                entry[0].times.first_scheduled_time = when

    def _push(
        self,
        state: RequestState,
        sequence: SequenceState,
        tokens: list[int],
        finish: FinishReason,
        stop_token: int,
        done: Processed,
    ) -> None:
        """Tokens of one row into its sequence: text, stop strings, the end."""
        sequence.fresh = True
        sequence.num_tokens += len(tokens)
        state.times.num_generation_tokens += len(tokens)
        stop, used = self._detokenize(state.request.params, sequence, tokens, finish)
        sequence.token_ids += tokens[:used]
        state.unread_bytes += BYTES_PER_TOKEN * used
        if stop is not None:
            drop = len(tokens) - used  # tokens of the same step after the one that completed the stop string
            sequence.num_tokens -= drop
            state.times.num_generation_tokens -= drop
            if drop and sequence.logprobs is not None:
                del sequence.logprobs[-drop:]
            if finish is FinishReason.NONE:
                done.aborts.append(state.key + sequence.index)
            self._end(state, sequence, "stop", stop, done)
        elif finish is not FinishReason.NONE:
            reason: int | None = None
            if finish is FinishReason.STOP and stop_token >= 0 and stop_token not in state.request.eos_ids:
                reason = stop_token
            self._end(state, sequence, finish.text or "stop", reason, done)
        if state.kind is not RequestOutputKind.FINAL_ONLY or state.finished:
            done.touched.append(state)

    def _detokenize(
        self, params: SamplingParams, sequence: SequenceState, tokens: list[int], finish: FinishReason
    ) -> tuple[str | None, int]:
        """(stop string found, tokens used up to it)."""
        detokenizer = sequence.detokenizer
        if detokenizer is None:
            return None, len(tokens)
        # the id that ended it shows no text of its own, as in vLLM
        hidden_stop = finish is FinishReason.STOP and not params.include_stop_str_in_output
        for i, token in enumerate(tokens):
            if hidden_stop and i == len(tokens) - 1:
                detokenizer.skip()
                continue
            stop = detokenizer.push(token)
            if stop is not None:
                return stop, i + 1
        return (detokenizer.finish() if finish is not FinishReason.NONE else None), len(tokens)

    def _end(
        self,
        state: RequestState,
        sequence: SequenceState,
        reason: str,
        stop_reason: int | str | None,
        done: Processed,
    ) -> None:
        self._finish(state, sequence, reason, stop_reason)
        if state.finished:
            done.iteration.finished.append(finished_request(state, done.now))

    def _finish(self, state: RequestState, sequence: SequenceState, reason: str, stop_reason: int | str | None) -> None:
        if sequence.detokenizer is not None and reason == "abort":
            sequence.detokenizer.finish()
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        sequence.fresh = True
        state.unfinished -= 1
        self._by_key.pop(state.key + sequence.index, None)
        if state.finished:
            self.requests.pop(state.key, None)

    def _add_logprobs(
        self,
        state: RequestState,
        sequence: SequenceState,
        columns: Columns,
        tokens: list[int],
        begin: int,
        end: int,
    ) -> None:
        wanted = state.request.params.logprobs
        if sequence.logprobs is None or wanted is None or sequence.cumulative_logprob is None:
            return
        for i in range(begin, end):
            entry = columns.at(i, tokens[i], wanted, self._tokenizer)
            sequence.cumulative_logprob += entry[tokens[i]].logprob
            sequence.logprobs.append(entry)
            state.unread_bytes += BYTES_PER_LOGPROB * len(entry)

    def _prompt_logprobs(self, columns_of: dict[int, LogprobColumns]) -> None:
        for key, raw in columns_of.items():
            entry = self._by_key.get(key)
            if entry is None or entry[1].index != 0:
                continue  # the n sequences share their prompt: the first one speaks for it
            state = entry[0]
            if state.prompt_logprobs is None:
                continue
            columns = Columns(raw)
            wanted = state.request.params.prompt_logprobs or 0
            ids = state.request.prompt_token_ids
            begin = len(state.prompt_logprobs)  # position 0 has no logprob: nothing comes before it
            for i in range(min(columns.size, len(ids) - begin)):
                state.prompt_logprobs.append(columns.at(i, ids[begin + i], wanted, self._tokenizer))


class Columns:
    """LogprobColumns, read."""

    def __init__(self, raw: LogprobColumns) -> None:
        self.chosen = np.frombuffer(raw.chosen, "<f4")  # [n]
        self.rank = np.frombuffer(raw.rank, "<i4")  # [n]
        self.top_ids = np.frombuffer(raw.top_ids, "<i4").reshape(-1, raw.k) if raw.k else None  # [n, k]
        self.top = np.frombuffer(raw.top, "<f4").reshape(-1, raw.k) if raw.k else None  # [n, k]

    @property
    def size(self) -> int:
        return len(self.chosen)

    def at(self, i: int, token: int, wanted: int, tokenizer: Tokenizer | None) -> LogprobsAt:
        """Entry i: the chosen token, then the `wanted` most likely ones."""
        entry = {token: Logprob(float(self.chosen[i]), int(self.rank[i]), text_of(token, tokenizer))}
        if wanted and self.top_ids is not None and self.top is not None:
            ids, values = self.top_ids[i, :wanted].tolist(), self.top[i, :wanted].tolist()
            for rank, (top_id, value) in enumerate(zip(ids, values, strict=True), 1):
                if top_id >= 0 and top_id not in entry:
                    entry[top_id] = Logprob(value, rank, text_of(top_id, tokenizer))
        return entry


def text_of(token: int, tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else tokenizer.token_text(token)


def note_times(state: RequestState, sequence: SequenceState, count: int, done: Processed) -> None:
    """Count tokens and gaps of one row."""
    times, stats, now = state.times, done.iteration, done.now
    stats.num_generated += count
    if times.first_token_time is None:
        times.first_token_time = now
        stats.num_prompt += len(state.request.prompt_token_ids)
        stats.first_token_s.append(now - times.arrival_time)
    elif sequence.last_token_time:
        stats.inter_token_s.append(now - sequence.last_token_time)
    sequence.last_token_time = times.last_token_time = now


def finished_request(state: RequestState, now: float) -> FinishedRequest:
    """The numbers of a request that has just ended."""
    times = state.times
    times.finished_time = now
    reason = "error" if state.error is not None else state.sequences[0].finish_reason or "abort"
    arrival, scheduled, first = times.arrival_time, times.first_scheduled_time, times.first_token_time
    return FinishedRequest(
        reason=reason,
        num_prompt=len(state.request.prompt_token_ids),
        num_generated=times.num_generation_tokens,
        n=len(state.sequences),
        max_tokens=state.request.params.max_tokens,
        e2e_s=now - arrival,
        queued_s=None if scheduled is None else scheduled - arrival,
        first_token_s=None if first is None else first - arrival,
    )
