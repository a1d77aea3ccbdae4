"""Parity with transformers: a tiny random checkpoint of a family, served by the real scheduler and core loop.

The reference is greedy `generate` on whole batches and one teacher-forced forward pass over what it gave. The engine
gets the same prompts in the worst company: admitted a few at a time, prefilled in whatever chunks the budget leaves,
batched with strangers that sample, preempted for want of pages, and some of them asked twice, to be hit from the prefix
cache. `run_family(backend, family)` gives a Report; test_parity_{torch,jax}.py hold it to the bounds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.core.loop import CoreLoop
from engine.core.messages import AddRequest, FromCore, LogprobColumns, RequestFailed, StepOutputs
from engine.core.start import scheduler_config
from engine.executor.base import SameProcess
from engine.params import SamplingParams
from engine.resolve import plan_cache, resolve
from engine.runner import Placement, StepHandle, load_runner
from engine.scheduler.scheduler import Scheduler
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config
from engine.step import StepPlan
from tests.checkpoints import ROPES, write_checkpoint

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

OUTPUTS = 64
LENGTHS = (5, 38, 77, 130)  # below and above every window (24, 40) and page
PAGE = 32  # two units, so that some hits end within a page and copy it
PROMPTS_EACH = 16
TOP = 4  # logprobs asked beside the chosen one's
SLOTS = 12
BUDGET = 48  # tokens a step: prompts of 77 and 130 never fit whole
PAGES = {"mistral": 16, "phi3": 16}  # nothing but windows: rows hold less
ENOUGH_FOR_SOME = 28  # pages, where 12 rows of up to 194 tokens want 84: somebody must be preempted
AGAIN = 6  # prompts asked again, each followed by a continuation of itself
SHORT = 16  # outputs of these
TIE = 1e-5  # top-2 gap of the reference under which another token is as good
BOUND = 1e-4  # of the difference of any logprob

ROPE_CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "linear": ("llama", (77,), {"rope_parameters": ROPES["linear"]}),
    "llama3": ("llama", (77,), {"rope_parameters": ROPES["llama3"]}),
    "yarn": ("qwen3", (77,), {"rope_parameters": ROPES["yarn"]}),
    # transformers changes to the long factors with token 65; longer prompts have them from the start, as served here
    "longrope": ("phi3", (77,), {"rope_parameters": ROPES["longrope"], "original_max_position_embeddings": 64}),
    "partial": ("phi3", (77,), {"rope_parameters": {**ROPES["default"], "partial_rotary_factor": 0.75}}),
}
"""name -> (family, prompt lengths, overrides of its config). Dynamic rope is compared in test_reference.py."""


@dataclass(frozen=True)
class Reference:
    """What transformers makes of one prompt."""

    prompt: list[int]
    outputs: list[int]  # greedy
    logprobs: F32  # [len(prompt) + OUTPUTS - 1, V]: entry t scores token t + 1

    def score(self, output_idx: int) -> F32:
        """Logprobs [V] that decide output number output_idx."""
        row: F32 = self.logprobs[len(self.prompt) - 1 + output_idx]
        return row


@dataclass
class Answer:
    """What the engine made of one prompt."""

    outputs: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top: list[list[float]] = field(default_factory=list)
    prompt_scores: F32 | None = None  # [len(prompt) - 1]
    num_cached: int = 0


@dataclass(kw_only=True)
class Report:
    """Differences from the reference, and proof that the company was bad."""

    family: str
    compared: int = 0  # output tokens compared
    mismatches: list[tuple[int, int]] = field(default_factory=list)  # (prompt, output index) with a clear winner
    waived: int = 0  # first mismatches of a prompt at a tie of the reference
    max_delta: float = 0.0
    preemptions: int = 0
    prefix_hits: int = 0  # tokens
    copies: int = 0  # partial pages
    chunks: Counter[int] = field(default_factory=Counter)  # sizes of prefill chunks
    max_rows: int = 0

    def __str__(self) -> str:
        return (
            f"{self.family}: {self.compared} tokens, max |d logprob| {self.max_delta:.1e}, "
            f"{len(self.mismatches)} mismatches, {self.waived} waived at ties, {self.preemptions} preemptions, "
            f"{self.prefix_hits} tokens hit, {self.copies} copies, {len(self.chunks)} chunk sizes, "
            f"up to {self.max_rows} rows"
        )


class Watched(SameProcess):
    """Notes the shapes of the steps."""

    report: Report

    def submit(self, plans: Sequence[StepPlan]) -> StepHandle:
        for plan in plans:
            self.report.max_rows = max(self.report.max_rows, plan.num_rows)
            self.report.copies += 0 if plan.copies is None else len(plan.copies.source)
            self.report.chunks.update(plan.num_new[plan.num_new > 1].tolist())
        return super().submit(plans)


# reference


def references(path: Path, lengths: Sequence[int], seed: int) -> list[Reference]:
    """Greedy outputs and logprobs of PROMPTS_EACH random prompts of each length."""
    torch.set_num_threads(1)  # threads cost more than they give at this size
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = torch.from_numpy(rng.integers(3, model.config.vocab_size, (PROMPTS_EACH, length)))
        with torch.inference_mode():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUTS, do_sample=False, pad_token_id=0
            )
            logprobs = model(whole[:, :-1], use_cache=False).logits.float().log_softmax(-1).numpy()
        for i in range(PROMPTS_EACH):
            made.append(Reference(ids[i].tolist(), whole[i, length:].tolist(), logprobs[i]))
    return made


# engine


def start(backend: str, path: Path, report: Report, pages: int) -> CoreLoop:
    """The engine as core/start.py builds it, with few pages, small steps and few shapes to compile."""
    config = EngineConfig(
        model=ModelConfig(dtype="float32"),
        cache=CacheConfig(block_size=PAGE, num_gpu_blocks_override=pages),
        schedule=ScheduleConfig(max_num_seqs=SLOTS, max_num_batched_tokens=BUDGET),
        backend=backend,
        device="cpu",
    )
    arch = parse_config(read_config(path))
    runner = load_runner(backend)
    resolved = resolve(config, arch, runner.describe())
    if resolved.runner.token_buckets:
        resolved = replace(
            resolved, runner=replace(resolved.runner, token_buckets=(SLOTS, BUDGET), row_buckets=(SLOTS,))
        )
    runner.configure(replace(resolved.runner, num_threads=1), Placement())
    runner.load(path)
    layout, max_model_len, _ = plan_cache(config, resolved, runner.cache_budget_bytes())
    runner.allocate_cache(layout)
    runner.warm_up()
    executor = Watched(runner)
    executor.report = report
    scheduler = Scheduler(scheduler_config(config, resolved, max_model_len), layout)
    return CoreLoop(scheduler, executor, depth=resolved.runner.max_in_flight)


def greedy(max_tokens: int = OUTPUTS, prompt_logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=TOP, prompt_logprobs=prompt_logprobs
    )


def serve(loop: CoreLoop, asked: Sequence[tuple[Sequence[int], SamplingParams]], seed: int, base: int) -> list[Answer]:
    """Run all requests, admitted a few at a time, with a stranger beside every fourth."""
    rng = random.Random(seed)
    answers = [Answer() for _ in asked]
    waiting = list(enumerate(asked))
    strangers = 0
    while waiting or loop.has_work:
        for _ in range(rng.choice((0, 0, 1, 3)) if waiting else 0):
            if not waiting:
                break
            index, (prompt, params) = waiting.pop(0)
            loop.handle(request(base + index, prompt, params))
            if index % 4 == 0:
                strangers += 1
                odd = SamplingParams(temperature=1.2, top_p=0.9, seed=index, max_tokens=rng.randint(1, 40))
                noise = [rng.randrange(3, 300) for _ in range(rng.randint(2, 60))]
                loop.handle(request(base + 100_000 + strangers, noise, odd))
        for message in loop.step():
            take(message, answers, base)
    return answers


def request(key: int, prompt: Sequence[int], params: SamplingParams) -> AddRequest:
    return AddRequest(key, np.asarray(prompt, "<i4").tobytes(), params, [], [], [])


def take(message: FromCore, answers: list[Answer], base: int) -> None:
    """Spread one step's columns over the answers; strangers' are dropped."""
    if isinstance(message, RequestFailed):
        raise AssertionError(f"request {message.key} failed: {message.message}")
    if not isinstance(message, StepOutputs):
        return
    keys, counts = np.frombuffer(message.keys, "<i8"), np.frombuffer(message.counts, "<i4")
    tokens, cached = np.frombuffer(message.tokens, "<i4"), np.frombuffer(message.num_cached, "<i4")
    columns = None if message.logprobs is None else unpack(message.logprobs)
    at = 0
    for key, count, hit in zip(keys.tolist(), counts.tolist(), cached.tolist(), strict=True):
        part = slice(at, at + count)
        at += count
        if not base <= key < base + len(answers):
            continue
        answer = answers[key - base]
        answer.outputs += tokens[part].tolist()
        answer.num_cached = max(answer.num_cached, hit)
        if columns is not None:
            chosen, top_ids, top = columns
            answer.chosen += chosen[part].tolist()
            answer.top_ids += top_ids[part].tolist()
            answer.top += top[part].tolist()
    for key, scores in (message.prompt_logprobs or {}).items():
        if base <= key < base + len(answers):
            answers[key - base].prompt_scores = unpack(scores)[0]


def unpack(columns: LogprobColumns) -> tuple[F32, I32, F32]:
    """(chosen [n], top_ids [n, k], top [n, k])."""
    chosen = np.frombuffer(columns.chosen, "<f4")
    shape = (len(chosen), columns.k)
    return (
        chosen,
        np.frombuffer(columns.top_ids, "<i4").reshape(shape),
        np.frombuffer(columns.top, "<f4").reshape(shape),
    )


# comparison


def compare(report: Report, index: int, wanted: Reference, got: Answer, first: int = 0, count: int = OUTPUTS) -> None:
    """One answer against outputs [first, first + count) of the reference, up to the first token that differs."""
    if len(got.outputs) != count or len(got.chosen) != count:
        raise AssertionError(f"prompt {index}: {len(got.outputs)} outputs, {len(got.chosen)} logprobs, not {count}")
    report.prefix_hits += got.num_cached
    if got.prompt_scores is not None:
        prompt = np.array(wanted.prompt)
        theirs = wanted.logprobs[np.arange(len(prompt) - 1), prompt[1:]]
        report.max_delta = max(report.max_delta, float(np.abs(theirs - got.prompt_scores).max()))
    for i, token in enumerate(got.outputs):
        row = wanted.score(first + i)
        report.max_delta = max(report.max_delta, *deltas(row, token, got.chosen[i], got.top_ids[i], got.top[i]))
        report.compared += 1
        if token != wanted.outputs[first + i]:
            best, second = np.sort(row)[::-1][:2]
            if best - second < TIE:
                report.waived += 1
            else:
                report.mismatches.append((index, first + i))
            return


def deltas(row: F32, token: int, chosen: float, top_ids: Sequence[int], top: Sequence[float]) -> Iterator[float]:
    """Differences of the chosen token's logprob and of the top ones. row: [V] of the reference."""
    yield abs(float(row[token]) - chosen)
    for token_id, value in zip(top_ids, top, strict=True):
        yield abs(float(row[token_id]) - value)


def run(backend: str, path: Path, family: str, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Report:
    """Serve a checkpoint folder and compare."""
    report = Report(family=family)
    wanted = references(path, lengths, seed)
    order = list(range(len(wanted)))
    random.Random(seed).shuffle(order)
    loop = start(backend, path, report, PAGES.get(family, ENOUGH_FOR_SOME))
    try:
        # prompt logprobs ask for every position, so those requests read no prefix hits
        asked = [(wanted[i].prompt, greedy(prompt_logprobs=0 if i % 3 == 0 else None)) for i in order]
        for i, answer in zip(order, serve(loop, asked, seed, base=0), strict=True):
            compare(report, i, wanted[i], answer)
        for nth, i in enumerate(index for index in order if len(wanted[index].prompt) > PAGE):
            if nth == AGAIN:
                break
            ask_again(loop, report, i, wanted[i], base=1000 + 10 * nth)
        report.preemptions = loop.scheduler.stats().num_preemptions
    finally:
        loop.shutdown()
    return report


def ask_again(loop: CoreLoop, report: Report, index: int, wanted: Reference, base: int) -> None:
    """The prompt once more, then the prompt with some of its own outputs, which the prefix cache then knows."""
    (answer,) = serve(loop, [(wanted.prompt, greedy(SHORT))], index, base)
    compare(report, index, wanted, answer, 0, SHORT)
    known = SHORT - 5
    (answer,) = serve(loop, [(wanted.prompt + wanted.outputs[:known], greedy(SHORT))], index, base + 1)
    compare(report, index, wanted, answer, known, SHORT)


def run_family(backend: str, family: str, folder: Path, lengths: Sequence[int] = LENGTHS, **overrides: Any) -> Report:
    """Write the family's tiny checkpoint into `folder` and run it."""
    return run(backend, write_checkpoint(family, folder, **overrides), family, lengths)


def hold(report: Report, crowded: bool = True) -> None:
    """Assert the project's bounds, and that what they are asked under did happen."""
    print(report)
    assert report.max_delta <= BOUND, str(report)
    assert not report.mismatches, f"{report}: {report.mismatches[:5]}"
    assert report.waived <= report.compared // 1000, str(report)
    assert len(report.chunks) >= 10 and report.max_rows >= 8 and report.prefix_hits > 0 and report.copies > 0
    assert report.preemptions > 0 or not crowded, str(report)
