"""OutputProcessor: step messages into RequestOutputs of each kind, ends, logprobs, n > 1, times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.core.messages import LogprobColumns, RequestFailed, StepOutputs
from engine.errors import InvalidValue, NeverFits, NotFinished, Overloaded
from engine.frontend.input import InputProcessor, ModelFacts
from engine.frontend.output import OutputProcessor, Processed, RequestState
from engine.frontend.pieces import LeadingSpace, Pieces
from engine.frontend.results import Logprob, RequestOutput
from engine.frontend.tokenizer import Tokenizer, load_tokenizer
from engine.params import RequestOutputKind, SamplingParams
from engine.request import FinishReason

EOS = 2
KINDS = list(RequestOutputKind)


class Bench:
    """An OutputProcessor fed by hand."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        facts = ModelFacts(max_model_len=512, vocab_size=4096, max_logprobs=20, eos_ids=(EOS,))
        self.inputs = InputProcessor(facts, tokenizer, None)
        self.outputs = OutputProcessor(tokenizer)
        self.encode = tokenizer.encode

    def add(self, params: SamplingParams, key: int = 0, prompt: str = "The fox") -> RequestState:
        return self.outputs.add(self.inputs.prepare(prompt, params), f"id{key}", key)

    def step(
        self,
        rows: dict[int, list[int]],
        finish: dict[int, FinishReason] | None = None,
        stop: dict[int, int] | None = None,
        logprobs: LogprobColumns | None = None,
        prompt_logprobs: dict[int, LogprobColumns] | None = None,
    ) -> Processed:
        finish, stop = finish or {}, stop or {}
        message = StepOutputs(
            keys=np.array(list(rows), "<i8").tobytes(),
            counts=np.array([len(t) for t in rows.values()], "<i4").tobytes(),
            tokens=np.array([t for tokens in rows.values() for t in tokens], "<i4").tobytes(),
            finish=np.array([finish.get(k, FinishReason.NONE) for k in rows], np.uint8).tobytes(),
            stop_token=np.array([stop.get(k, -1) for k in rows], "<i4").tobytes(),
            num_cached=np.full(len(rows), 1, "<i4").tobytes(),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        return self.outputs.process(message)


@pytest.fixture
def bench(tokenizers: dict[str, Tokenizer]) -> Bench:
    return Bench(tokenizers["byte_level"])


def taken(state: RequestState) -> RequestOutput:
    output = state.take()
    assert output is not None
    return output


def columns(n: int, k: int) -> LogprobColumns:
    return LogprobColumns(
        chosen=(-np.arange(n, dtype="<f4") - 1).tobytes(),
        rank=np.full(n, 9, "<i4").tobytes(),
        top_ids=np.tile(np.arange(100, 100 + k, dtype="<i4"), (n, 1)).tobytes(),
        top=np.tile(-np.arange(k, dtype="<f4"), (n, 1)).tobytes(),
        k=k,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_output_kinds(bench: Bench, kind: RequestOutputKind) -> None:
    state = bench.add(SamplingParams(output_kind=kind))
    ids = bench.encode("jumps over the dog")
    seen = []
    for i, token in enumerate(ids):
        last = i == len(ids) - 1
        done = bench.step({0: [token]}, {0: FinishReason.LENGTH} if last else None)
        assert done.touched == ([state] if last or kind is not RequestOutputKind.FINAL_ONLY else [])
        output = state.take()
        assert (output is None) == (kind is RequestOutputKind.FINAL_ONLY and not last)
        assert state.take() is None, "nothing is given twice"
        seen += [] if output is None else [output]
    last_output = seen[-1]
    assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
    assert last_output.outputs[0].finish_reason == "length"
    if kind is RequestOutputKind.DELTA:
        assert "".join(o.outputs[0].text for o in seen) == "jumps over the dog"
        assert [i for o in seen for i in o.outputs[0].token_ids] == ids
    else:
        assert last_output.outputs[0].text == "jumps over the dog"
        assert last_output.outputs[0].token_ids == ids
        assert len(seen) == (1 if kind is RequestOutputKind.FINAL_ONLY else len(ids))
    assert bench.outputs.requests == {}


def test_slow_readers_get_everything_at_once(bench: Bench) -> None:
    state = bench.add(SamplingParams(output_kind=RequestOutputKind.DELTA, logprobs=0))
    ids = bench.encode("jumps over the dog")
    for token in ids:
        bench.step({0: [token]}, logprobs=columns(1, 0))
    assert state.unread_bytes > 0
    output = taken(state)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("jumps over the dog", ids)
    assert output.outputs[0].logprobs is not None
    assert len(output.outputs[0].logprobs) == len(ids)
    assert state.unread_bytes == 0


@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_ends_the_request_and_aborts_the_core(bench: Bench, include: bool) -> None:
    state = bench.add(SamplingParams(stop=["over t"], include_stop_str_in_output=include, logprobs=1), key=5)
    ids = bench.encode("jumps over the dog")
    done = bench.step({5: ids}, logprobs=columns(len(ids), 1))
    assert done.aborts == [5]
    completion = taken(state).outputs[0]
    assert completion.text == ("jumps over t" if include else "jumps ")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "over t")
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) < len(ids)
    assert state.times.num_generation_tokens == len(completion.token_ids)
    assert done.iteration.finished[0].reason == "stop"
    assert bench.step({5: ids}).touched == [], "what still comes is dropped"


def test_a_stop_string_in_the_last_token_beats_its_length_end(bench: Bench) -> None:
    state = bench.add(SamplingParams(stop=["dog"]))
    done = bench.step({0: bench.encode("the dog")}, {0: FinishReason.LENGTH})
    assert done.aborts == []
    completion = taken(state).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("the ", "stop", "dog")


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(("token", "reason"), [(EOS, None), (1, 1)])
def test_stop_tokens(bench: Bench, include: bool, token: int, reason: int | None) -> None:
    params = SamplingParams(stop_token_ids=[1], include_stop_str_in_output=include, skip_special_tokens=False)
    state = bench.add(params)
    ids = bench.encode("dog")
    bench.step({0: [*ids, token]}, {0: FinishReason.STOP}, {0: token})
    completion = taken(state).outputs[0]
    assert completion.token_ids == [*ids, token]
    assert completion.text == "dog" + (["", "<|im_start|>", "<|im_end|>"][token] if include else "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", reason)


def test_logprobs_have_vllms_shape(bench: Bench) -> None:
    state = bench.add(SamplingParams(logprobs=2, prompt_logprobs=1))
    ids = state.request.prompt_token_ids
    prompt = columns(len(ids) - 1, 3)
    bench.step({0: [101, 50]}, logprobs=columns(2, 3), prompt_logprobs={0: prompt})
    output = taken(state)
    text = bench.outputs._tokenizer.token_text  # type: ignore[union-attr]
    assert output.outputs[0].logprobs == [
        {101: Logprob(-1.0, 9, text(101)), 100: Logprob(0.0, 1, text(100))},
        {50: Logprob(-2.0, 9, text(50)), 100: Logprob(0.0, 1, text(100)), 101: Logprob(-1.0, 2, text(101))},
    ]
    assert output.outputs[0].cumulative_logprob == -3.0
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [next(iter(at or {})) for at in output.prompt_logprobs[1:]] == ids[1:]
    assert all(len(at or {}) == 2 for at in output.prompt_logprobs[1:])


def test_n_answers_are_one_request(bench: Bench) -> None:
    final = bench.add(SamplingParams(n=2, output_kind=RequestOutputKind.FINAL_ONLY), key=10)
    stream = bench.add(SamplingParams(n=2, output_kind=RequestOutputKind.DELTA), key=20)
    a, b = bench.encode(" fox")[0], bench.encode(" dog")[0]
    done = bench.step({11: [b], 21: [b]}, {11: FinishReason.LENGTH})
    assert done.iteration.num_generated == 2
    assert done.iteration.num_prompt == 2 * len(final.request.prompt_token_ids)
    assert final.take() is None
    assert [c.index for c in taken(stream).outputs] == [1]
    done = bench.step({10: [a], 20: [a], 21: [b]}, dict.fromkeys((10, 20, 21), FinishReason.LENGTH))
    assert done.touched == [final, stream, stream]
    assert [f.n for f in done.iteration.finished] == [2, 2]
    output = taken(final)
    assert [(c.index, c.text, c.finish_reason) for c in output.outputs] == [
        (0, " fox", "length"),
        (1, " dog", "length"),
    ]
    assert output.num_cached_tokens == 1
    assert [(c.index, c.text) for c in taken(stream).outputs] == [(0, " fox"), (1, " dog")]


def test_errors_reach_the_reader_and_stop_the_siblings(bench: Bench) -> None:
    state = bench.add(SamplingParams(n=3), key=4)
    done = bench.outputs.process(RequestFailed(5, "context_length_exceeded", "too long"))
    assert done.aborts == [4, 6]
    assert done.iteration.finished[0].reason == "error"
    with pytest.raises(NeverFits, match="too long"):
        state.take()
    for key, code, kind in ((20, "overloaded", Overloaded), (21, "invalid_value", InvalidValue)):
        refused = bench.add(SamplingParams(), key=key)
        bench.outputs.process(RequestFailed(key, code, "no"))
        with pytest.raises(kind):
            refused.take()
    other = bench.add(SamplingParams(), key=8)
    bench.outputs.process(RequestFailed(8, "cache_lost", "try again"))
    with pytest.raises(NotFinished) as raised:
        other.take()
    assert raised.value.code == "cache_lost"
    assert InvalidValue.code == "invalid_value", "codes of classes are not touched"
    assert bench.outputs.process(RequestFailed(99, "x", "unknown key")).touched == []


def test_abort_ends_the_reader_once(bench: Bench) -> None:
    state = bench.add(SamplingParams())
    bench.step({0: bench.encode("do")})
    finished = bench.outputs.abort(state)
    assert finished is not None
    assert finished.reason == "abort"
    assert bench.outputs.abort(state) is None
    output = taken(state)
    assert (output.finished, output.outputs[0].finish_reason, output.outputs[0].text) == (True, "abort", "do")
    assert bench.outputs.requests == {}


def test_times(bench: Bench) -> None:
    state = bench.add(SamplingParams())
    first = bench.step({0: [5]}).iteration
    later = bench.step({0: [5, 6]}, {0: FinishReason.LENGTH}).iteration
    assert len(first.first_token_s) == 1
    assert first.inter_token_s == []
    assert (first.num_prompt, later.num_prompt) == (len(state.request.prompt_token_ids), 0)
    assert len(later.inter_token_s) == 1
    assert later.inter_token_s[0] >= 0
    end = later.finished[0]
    assert (end.num_generated, end.num_prompt, end.max_tokens) == (3, first.num_prompt, 16)
    assert end.e2e_s >= (end.first_token_s or 0) > 0


class Exploding(Pieces):
    """Fails at one token."""

    def bytes(self, token_id: int) -> bytes:
        if token_id == 77:
            raise RuntimeError("a bug")
        return super().bytes(token_id)


def test_a_fault_ends_its_own_request_only(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["byte_level"])
    tokenizer.pieces = Exploding(tokenizer.backend, {}, str.encode, str.encode, LeadingSpace.KEEP)
    bench = Bench(tokenizer)
    states = [bench.add(SamplingParams(n=2), key=10 * i) for i in range(4)]
    rows = {10 * i + j: [77 if (i, j) == (2, 0) else 60 + j] for i in range(4) for j in range(2)}
    done = bench.step(rows)
    assert done.aborts == [20, 21]
    assert [f.reason for f in done.iteration.finished] == ["error"]
    with pytest.raises(NotFinished, match="internal error"):
        states[2].take()
    done = bench.step({10 * i + j: [62] for i in range(4) for j in range(2)})
    for i in (0, 1, 3):
        assert [c.token_ids for c in taken(states[i]).outputs] == [[60, 62], [61, 62]]
