"""Parity with transformers, through the whole engine: start_core, the real scheduler, core loop and runner.

`run_case(backend, case, folder)` serves greedy prompts in bad company: they come a few at a time, are prefilled in
chunks that the token budget cuts where it likes, sit in a step beside strangers that sample with penalties and
seeds, lose their pages to others and are computed again, and share prefixes, so that part of a prompt is read from the
cache. The reference is one forward pass of transformers over each prompt and the tokens the engine gave it: when every
token is the reference's own choice there, greedy decoding of the reference gives the same text (by induction).
Reference sequences are padded to the served length, which fixes the ropes that look at the length (dynamic, longrope).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.core.loop import CoreLoop
from engine.core.messages import AddRequest, FromCore, LogprobColumns, RequestFailed, StepOutputs
from engine.core.start import start_core
from engine.executor.base import Executor
from engine.params import SamplingParams
from engine.runner import StepHandle
from engine.step import StepPlan
from tests.checkpoints import ROPES, write_checkpoint

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

BOUND = 1e-4  # largest difference of a log-probability
TIE = 1e-5  # a reference whose best two are closer than this may be contradicted
MAX_WAIVED = 8  # of some 4,350 tokens
TOP = 4  # log-probabilities asked for beside the chosen token's
VOCAB = 320
PAGE = 16
MAX_SEQS = 8
MAX_TOKENS = 48  # of a step
MAX_CHUNK = 29  # of a prompt in a step: never a whole number of pages
STRANGERS = 1 << 20  # first key of the requests that are not compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint and the length it is served with. pages: of the KV pool, few enough that rows lose theirs."""

    name: str
    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    max_model_len: int = 208
    pages: int = 34
    quantization: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """prompts: how many are compared; again: how many of these are asked again, three times in all."""

    prompts: int = 64
    outputs: int = 64
    again: int = 2


FULL = Sizes()
QUICK = Sizes(prompts=24)

FAMILY_CASES = (
    Case(name="llama", family="llama"),
    Case(name="mistral", family="mistral", pages=10),
    Case(name="qwen2", family="qwen2"),
    Case(name="qwen3", family="qwen3"),
    Case(name="gemma2", family="gemma2"),
    Case(name="gemma3", family="gemma3"),
    Case(name="phi3", family="phi3", pages=11),
)

ROPE_CASES = (
    *(
        Case(name=f"llama-{kind}", family="llama", overrides={"rope_parameters": rope})
        for kind, rope in ROPES.items()
        if kind != "default"  # the family's own
    ),
    Case(
        name="llama-dynamic-grown",
        family="llama",
        overrides={"rope_parameters": {**ROPES["dynamic"], "factor": 4.0}, "max_position_embeddings": 64},
    ),
    Case(
        name="phi3-longrope",
        family="phi3",
        overrides={"rope_parameters": ROPES["longrope"], "original_max_position_embeddings": 64},
        pages=11,
    ),
    Case(
        name="phi3-longrope-short",
        family="phi3",
        overrides={
            "rope_parameters": {**ROPES["longrope"], "original_max_position_embeddings": 128},
            "original_max_position_embeddings": 128,
        },
        max_model_len=128,
        pages=11,
    ),
)

RUNS = (
    *(pytest.param(case, FULL, id=case.name) for case in FAMILY_CASES),
    *(pytest.param(case, QUICK, id=case.name) for case in ROPE_CASES),
    *(pytest.param(case, FULL, id=f"{case.name}-full", marks=pytest.mark.slow) for case in ROPE_CASES),
)
"""What both backends' tests run."""


@dataclass(slots=True)
class Answer:
    """What the engine gave for one prompt."""

    prompt: I32
    tokens: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top: list[list[float]] = field(default_factory=list)
    prompt_scores: LogprobColumns | None = None
    num_cached: int = -1
    finish: int = 0


@dataclass(slots=True, kw_only=True)
class Report:
    """Counts of one run. `waived` tokens differ where the reference itself is undecided."""

    name: str
    tokens: int = 0
    prompt_tokens: int = 0  # whose log-probabilities were compared
    waived: int = 0
    wrong: list[str] = field(default_factory=list)  # contradicted tokens, none are accepted
    difference: float = 0.0
    total: float = 0.0  # of all differences, `compared` of them
    compared: int = 0
    preemptions: int = 0
    hits: int = 0  # prompt tokens found in the prefix cache
    split: int = 0  # chunks that were not the last of their prompt
    mixed: int = 0  # steps with both a chunk and a decoding row
    start_s: float = 0.0
    serve_s: float = 0.0
    reference_s: float = 0.0

    def line(self) -> str:
        return (
            f"{self.name}: {self.tokens} tokens, {self.prompt_tokens} prompt tokens, {self.waived} waived, "
            f"{len(self.wrong)} wrong, |d logprob| <= {self.difference:.1e}, {self.preemptions} preemptions, "
            f"{self.hits} tokens hit, {self.split} split chunks, {self.mixed} mixed steps; "
            f"start {self.start_s:.1f} s, serve {self.serve_s:.1f} s, reference {self.reference_s:.1f} s"
        )


class Watched:
    """An executor before another, counting the steps that the test wants to have seen."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.split = 0
        self.mixed = 0
        self.provide_mask, self.collect = executor.provide_mask, executor.collect
        self.poll, self.shutdown = executor.poll, executor.shutdown

    def submit(self, plans: Sequence[StepPlan]) -> StepHandle:
        for plan in plans:
            self.split += int(np.count_nonzero(plan.num_logits == 0))
            self.mixed += bool((plan.num_new > 1).any() and ((plan.num_new == 1) & (plan.num_logits == 1)).any())
        return self.executor.submit(plans)


def run_case(backend: str, case: Case, folder: Path, sizes: Sizes = FULL, reference: Path | None = None) -> Report:
    """Serve, compare, count. reference: a checkpoint to compare with, when not the one that is served."""
    write_checkpoint(case.family, folder, **case.overrides)
    return run_folder(backend, case, folder, sizes, reference)


def run_folder(backend: str, case: Case, folder: Path, sizes: Sizes = FULL, reference: Path | None = None) -> Report:
    """The same for a checkpoint that is there already."""
    report = Report(name=f"{backend} {case.name}")
    began = time.monotonic()
    loop, _ = start_core(engine_config(backend, case), folder)
    watched = loop.executor = Watched(loop.executor)
    report.start_s = time.monotonic() - began
    began = time.monotonic()
    answers = serve_all(loop, case, sizes)
    report.serve_s = time.monotonic() - began
    report.preemptions = loop.scheduler.stats().num_preemptions
    report.split, report.mixed = watched.split, watched.mixed
    loop.scheduler.check_integrity()
    loop.shutdown()
    began = time.monotonic()
    compare(report, answers, Reference(reference or folder, case.max_model_len), sizes)
    report.reference_s = time.monotonic() - began
    return report


def engine_config(backend: str, case: Case) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(dtype="float32", max_model_len=case.max_model_len, quantization=case.quantization),
        cache=CacheConfig(block_size=PAGE, num_gpu_blocks_override=case.pages),
        schedule=ScheduleConfig(
            max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS, long_prefill_token_threshold=MAX_CHUNK
        ),
        backend=backend,
        device="cpu",
    )


# what is asked


def make_prompts(case: Case, sizes: Sizes, rng: np.random.Generator) -> list[I32]:
    """Lengths from 1 to what the model length leaves; every second prompt begins like one before it."""
    longest = case.max_model_len - sizes.outputs
    prompts: list[I32] = []
    for i in range(sizes.prompts):
        length = longest if i == 0 else int(rng.integers(1, longest + 1))
        prompt = rng.integers(3, VOCAB, length).astype(np.int32)
        if i % 2:
            other = prompts[int(rng.integers(0, i))]
            shared = min(length, len(other), int(rng.integers(PAGE, longest + 1)))
            prompt[:shared] = other[:shared]
        prompts.append(prompt)
    return prompts


def greedy(index: int, sizes: Sizes) -> SamplingParams:
    """Every fifth asks for prompt log-probabilities too; those read no prefix hits."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=sizes.outputs,
        ignore_eos=True,
        logprobs=TOP,
        prompt_logprobs=1 if index % 5 == 4 else None,
    )


def stranger(key: int, case: Case, rng: np.random.Generator) -> AddRequest:
    """A request that samples in some way; its answer is nobody's business."""
    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.7, 1.3])),
        top_p=float(rng.choice([0.6, 1.0])),
        top_k=int(rng.choice([0, 7])),
        min_p=float(rng.choice([0.0, 0.05])),
        repetition_penalty=float(rng.choice([1.0, 1.3])),
        frequency_penalty=float(rng.choice([0.0, 0.4])),
        presence_penalty=float(rng.choice([0.0, -0.3])),
        seed=int(rng.integers(0, 1 << 40)),
        max_tokens=int(rng.integers(1, 40)),
        logprobs=2 if rng.integers(0, 2) else None,
        logit_bias={int(rng.integers(3, VOCAB)): 3.0} if rng.integers(0, 2) else None,
    )
    prompt = rng.integers(3, VOCAB, int(rng.integers(1, case.max_model_len - 40))).astype(np.int32)
    return request(key, prompt, params)


def request(key: int, prompt: I32, params: SamplingParams) -> AddRequest:
    return AddRequest(key, prompt.astype("<i4").tobytes(), params, [], [], [])


def serve_all(loop: CoreLoop, case: Case, sizes: Sizes) -> dict[int, Answer]:
    """All prompts with a stranger after every second; then some of them again."""
    rng = np.random.default_rng(11)
    answers: dict[int, Answer] = {}
    arrivals: list[AddRequest] = []
    for key, prompt in enumerate(make_prompts(case, sizes, rng)):
        answers[key] = Answer(prompt)
        arrivals.append(request(key, prompt, greedy(key, sizes)))
        if key % 2:
            arrivals.append(stranger(STRANGERS + key, case, rng))
    serve(loop, arrivals, answers, rng)
    for prompt in sorted((answers[key].prompt for key in answers), key=len)[-1 - sizes.again : -1]:
        # alone, so that the pages are still there: twice the same, then the conversation goes on
        for _ in range(2):
            first = ask(loop, prompt, answers, sizes, rng)
        longer = np.concatenate((prompt, np.array(first.tokens, np.int32)))[: case.max_model_len - sizes.outputs]
        ask(loop, longer, answers, sizes, rng)
    return answers


def ask(loop: CoreLoop, prompt: I32, answers: dict[int, Answer], sizes: Sizes, rng: np.random.Generator) -> Answer:
    """One prompt alone."""
    key = len(answers)
    answers[key] = Answer(prompt)
    serve(loop, [request(key, prompt, greedy(0, sizes))], answers, rng)
    return answers[key]


def serve(loop: CoreLoop, arrivals: Iterable[AddRequest], answers: dict[int, Answer], rng: np.random.Generator) -> None:
    """Run the loop until everything is answered; up to two requests arrive before a step."""
    waiting = deque(arrivals)
    while waiting or loop.has_work:
        for _ in range(min(len(waiting), int(rng.integers(0, 3)))):
            loop.handle(waiting.popleft())
        for message in loop.step():
            take(message, answers)


def take(message: FromCore, answers: dict[int, Answer]) -> None:
    """Spread a step's columns over the answers."""
    if isinstance(message, RequestFailed):
        raise AssertionError(f"request {message.key}: {message.code}: {message.message}")
    if not isinstance(message, StepOutputs):
        return
    tokens = np.frombuffer(message.tokens, "<i4").tolist()
    columns = None if message.logprobs is None else unpack(message.logprobs)
    finish, cached = message.finish, np.frombuffer(message.num_cached, "<i4").tolist()
    at = 0
    for i, (key, count) in enumerate(zip(np.frombuffer(message.keys, "<i8"), np.frombuffer(message.counts, "<i4"))):
        begin, at = at, at + int(count)
        answer = answers.get(int(key))
        if answer is None:
            continue
        answer.tokens += tokens[begin:at]
        answer.finish = finish[i]
        answer.num_cached = cached[i]
        if columns is not None:
            chosen, rank, top_ids, top = columns
            answer.chosen += chosen[begin:at].tolist()
            answer.rank += rank[begin:at].tolist()
            answer.top_ids += top_ids[begin:at].tolist()
            answer.top += top[begin:at].tolist()
    for key, scores in (message.prompt_logprobs or {}).items():
        answers[key].prompt_scores = scores


def unpack(columns: LogprobColumns) -> tuple[F32, I32, I32, F32]:
    """(chosen [n], rank [n], top ids [n, k], top [n, k])."""
    chosen, rank = np.frombuffer(columns.chosen, "<f4"), np.frombuffer(columns.rank, "<i4")
    shape = (len(chosen), columns.k)
    top_ids = np.frombuffer(columns.top_ids, "<i4").reshape(shape)
    return chosen, rank, top_ids, np.frombuffer(columns.top, "<f4").reshape(shape)


# what is right


class Reference:
    """transformers, eager attention, in float64: in float32 it is itself 1e-4 off where layers blow a rounding up.

    A reference whose inputs are rounded stays as it is: in float64 other numbers would be rounded.
    """

    def __init__(self, folder: Path, length: int) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        if getattr(self.model.config, "quantization_config", None) is None:
            self.model = self.model.double()
        self.length = length

    def logprobs(self, rows: Sequence[I32]) -> F64:
        """[B, length, V] of sequences padded on the right: attention is causal, so padding changes nothing before."""
        ids = torch.zeros(len(rows), self.length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row)
        with torch.inference_mode():
            logits = self.model(ids, use_cache=False).logits
        result: F64 = logits.double().log_softmax(-1).numpy()
        return result


def compare(report: Report, answers: dict[int, Answer], reference: Reference, sizes: Sizes) -> None:
    """Every answer against the reference; findings go into the report."""
    keys = list(answers)
    for begin in range(0, len(keys), 16):
        some = [answers[key] for key in keys[begin : begin + 16]]
        sequences = [np.concatenate((a.prompt, np.array(a.tokens, np.int32))) for a in some]
        for key, answer, table in zip(keys[begin:], some, reference.logprobs(sequences)):
            if len(answer.tokens) != sizes.outputs or len(answer.chosen) != sizes.outputs or not answer.finish:
                report.wrong.append(f"prompt {key}: {len(answer.tokens)} tokens, finish {answer.finish}")
                continue
            report.hits += answer.num_cached
            compare_outputs(report, key, answer, table)
            if answer.prompt_scores is not None:
                compare_prompt(report, answer, table)


def compare_outputs(report: Report, key: int, answer: Answer, table: F64) -> None:
    """table: [length, V]; row p scores the token at p + 1."""
    first = len(answer.prompt) - 1
    rows = table[first : first + len(answer.tokens)]  # [n, V]
    at = np.arange(len(rows))
    tokens = np.array(answer.tokens)
    lead = rows.max(-1) - rows[at, tokens]  # of the reference's choice over ours
    for i in np.flatnonzero(lead):
        if lead[i] < TIE:
            report.waived += 1
        else:
            report.wrong.append(f"prompt {key} of {len(answer.prompt)}, output {i}: behind by {lead[i]:.1e}")
    report.tokens += len(rows)
    top_ids, top = np.array(answer.top_ids)[:, :TOP], np.array(answer.top)[:, :TOP]  # a stranger may want more
    compare_scores(report, rows, tokens, (np.array(answer.chosen), np.array(answer.rank), top_ids, top))


def compare_prompt(report: Report, answer: Answer, table: F64) -> None:
    """Prompt tokens 1 .. len - 1."""
    assert answer.prompt_scores is not None
    scores = unpack(answer.prompt_scores)
    rows = table[: len(answer.prompt) - 1]
    if len(scores[0]) != len(rows):
        report.wrong.append(f"{len(scores[0])} prompt log-probabilities of {len(rows)}")
        return
    report.prompt_tokens += len(rows)
    compare_scores(report, rows, answer.prompt[1:], scores)


def compare_scores(report: Report, rows: F64, tokens: I32, scores: tuple[F32, I32, I32, F32]) -> None:
    """rows: [n, V] of the reference; tokens: [n]; scores: chosen, rank [n], top ids, top [n, k] of the engine."""
    chosen, rank, top_ids, top = scores
    theirs = rows[np.arange(len(rows)), tokens][:, None]
    note(report, chosen[:, None] - theirs)
    note(report, top - np.take_along_axis(rows, top_ids, axis=1))
    # what is called the top must be it: compared as values, as ties may swap ids
    note(report, top - np.sort(rows, axis=1)[:, : -1 - top.shape[1] : -1])
    best, worst = 1 + (rows > theirs + BOUND).sum(1), (rows >= theirs - BOUND).sum(1)
    for i in np.flatnonzero((rank < best) | (rank > worst)):
        report.wrong.append(f"a token of rank {best[i]} to {worst[i]} is said to have rank {rank[i]}")


def note(report: Report, differences: F64) -> None:
    if differences.size:
        largest = float(np.abs(differences).max())
        report.difference = max(report.difference, largest if np.isfinite(largest) else np.inf)
        report.total += float(np.abs(differences).sum())
        report.compared += differences.size


def check_report(report: Report) -> None:
    """The bounds of the project, and that the company was as bad as it should be."""
    print(report.line())
    assert not report.wrong, report.wrong[:5]
    assert report.difference <= BOUND
    assert report.waived <= MAX_WAIVED
    assert min(report.preemptions, report.hits, report.split, report.mixed) > 0
