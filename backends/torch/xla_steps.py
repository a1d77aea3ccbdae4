"""Steps through torch-xla (`--device xla`): torch_models traced into one XLA program a padded shape.

Called by backends/torch/runner.py. Nothing runs while a step is traced; `torch_xla.sync` compiles what was, or finds it
compiled, and starts it. Tables and cache stay on the device: a program that changes them writes over what it was given.
Always true: what a traced function leaves behind when it returns are tables, caches and its results, for every live
tensor of torch-xla is an output of the next program. Letters: T tokens · S rows · V vocabulary · D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch_xla
from torch import Tensor
from torch_xla.backends import set_mat_mul_precision
from torch_xla.debug import metrics

from backends.torch.eager import EagerSteps
from backends.torch.results import Outcome, Scores
from backends.torch.sample import argmax, pick, score
from backends.torch.step import Loaded, Step
from backends.torch.xla import ROWS, Bridge, attend, choose_kernels, make_caches, make_shape
from backends.torch.xla_batch import COPIES, Packer, Padded, Shape, unpack
from backends.torch.xla_tables import Call, PaddedTables
from cuda_kernels.dispatch import Work
from engine.errors import fail
from engine.opened import Use
from engine.runner import Progress
from engine.step import Bucket, empty_plan

EVERYTHING = Use(Use.LOGPROBS - 1)  # one program samples for every step that is not greedy
SCORE_BYTES = 64 << 20
"""Most scratch memory of one call that scores prompt tokens."""


def traced(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method outside of inference mode, whose tensors torch-xla 2.9 cannot take apart."""

    @functools.wraps(method)
    def outside(*args: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args)

    return outside


class XlaSteps(EagerSteps):
    """EagerSteps in padded programs."""

    def __init__(self, loaded: Loaded, platform: str) -> None:
        """platform: "cpu" | "tpu". Makes the caches."""
        super().__init__(loaded)
        config, tables = loaded.config, loaded.tables
        if not isinstance(tables, PaddedTables):
            fail("torch-xla needs padded tables")
        self._tables = tables
        if config.dtype == "float32":  # a TPU would round inputs of products to bfloat16
            set_mat_mul_precision("highest")
        self._bridge = Bridge(platform, config.dtype)
        self._kernels = choose_kernels(loaded.layout, platform)
        layers = max(pool.num_layers for pool in loaded.layout.pools)
        self._layers = [tables.to_device(np.full(1, layer, np.int32)) for layer in range(layers)]
        rows, groups = max(config.row_buckets), len(loaded.layout.groups)
        shapes = [make_shape(tokens, rows, groups) for tokens in sorted(set(config.token_buckets))]
        self._packers = {shape.tokens: Packer(shape, config.max_slots) for shape in shapes}
        vocab = config.arch.vocab_size
        self._num_top = min(config.sampler_limits.max_logprobs, vocab)
        self._score_rows = int(np.clip(SCORE_BYTES // (12 * vocab), 8, 64))
        sizes = {packer.shape.rows for packer in self._packers.values()}
        self._no_mask = {size: tables.to_device(np.ones((size, vocab), np.bool_)) for size in sizes}
        self._fresh()

    @traced
    def _fresh(self) -> None:
        """Empty pages and tables."""
        loaded = self._loaded
        self._tables.reset()
        loaded.caches[:] = make_caches(loaded.layout, self._kernels, self._tables.device)
        torch_xla.sync()

    def lose(self) -> bool:
        """A failed program had been given the cache and the tables."""
        self._fresh()
        return True

    def num_compiles(self) -> int:
        """Programs that torch-xla compiled in this process, other runners' included."""
        found = metrics.metric_data("CompileTime")
        return 0 if found is None else found[0]

    @traced
    def warm_up(self, progress: Progress | None = None) -> None:
        """Run every program once, on padding."""
        jobs: list[Callable[[], Any]] = [lambda call=call: self._change(call) for call in self._tables.empty_calls()]
        pools = len(self._loaded.caches)
        jobs += [lambda pool=pool: self._copy(pool, np.zeros((3, COPIES), np.int32)) for pool in range(pools)]
        sizes = set()
        for packer in self._packers.values():
            shape = packer.shape
            plan = empty_plan(0, Bucket(tokens=shape.tokens, rows=shape.rows))
            padded = packer.pack(plan, [None] * shape.groups, False)
            jobs.append(lambda padded=padded: self._score_all(self._run(padded)[1], *np.zeros((2, 1), np.int32)))
            if shape.rows not in sizes:
                sizes.add(shape.rows)
                jobs.append(lambda padded=padded: self._warm_sampler(padded))
        for done, job in enumerate(jobs, 1):
            job()
            if progress is not None:
                progress("warm_up", done, len(jobs))
        torch_xla.sync(wait=True)

    def _warm_sampler(self, padded: Padded) -> None:
        logits, _, flags = self._run(padded)
        self._score(logits, self._sample(logits, padded.sampling, None, flags))

    # steps

    def prepare(self, step: Step) -> None:
        """Copy out of the plan what the later jobs read."""
        plan, tables = step.plan, self._tables
        packer = self._packers[plan.bucket.tokens]
        calls = [] if plan.opened is None else tables.open_calls(plan.opened)
        riding = []
        for group in range(packer.shape.groups):
            delta = plan.page_deltas[group] if plan.page_deltas else None
            if delta is not None and len(delta.slots) > packer.shape.deltas:
                calls += tables.page_calls(group, delta)
                delta = None
            riding.append(delta)
        step.padded = packer.pack(plan, riding, step.uses is Use.NONE and not plan.late_mask, calls)

    def take_mask(self, step: Step, allowed: np.ndarray) -> None:
        if step.padded is None:
            fail(f"step {step.step_id} was not prepared")
        mask = np.ones((step.padded.shape.rows, allowed.shape[1]), np.bool_)
        mask[: len(allowed)] = allowed
        step.mask = self._tables.to_device(mask)

    @traced
    def forward(self, step: Step) -> None:
        padded = step.padded
        if padded is None:
            fail(f"step {step.step_id} was not prepared")
        for call in padded.calls:
            self._change(call)
        for pool, copies in padded.copies:
            self._copy(pool, copies)
        logits, hidden, flags = self._run(padded)
        scores = [] if padded.scored is None else self._score_all(hidden, *padded.scored)
        step.outcome = Outcome(logits=logits, bad=flags, prompt_scores=scores)

    @traced
    def sample(self, step: Step) -> None:
        """The sampling program, unless the forward program has sampled."""
        outcome, padded = step.outcome, step.padded
        if outcome is None or padded is None:
            fail(f"step {step.step_id} has not run")
        flags, rows = outcome.bad, padded.shape.rows
        if not padded.greedy:
            flags = self._sample(outcome.logits, padded.sampling, step.mask, flags)
        if step.plan.num_logprobs >= 0:
            outcome.scores = self._score(outcome.logits, flags)
        outcome.broken = flags
        outcome.send(flags, (0, rows, 2 * rows, 3 * rows))

    # programs: each traces in a function of its own, so that nothing else is alive when the program is cut off

    def _change(self, call: Call) -> None:
        self._tables.run(call)
        torch_xla.sync()

    def _copy(self, pool: int, copies: np.ndarray) -> None:
        """copies: i32 [3, COPIES] source, target, tokens (0 pads)."""
        copy_pages(self._loaded.caches[pool], *self._tables.to_device(copies))
        torch_xla.sync()

    def _run(self, padded: Padded) -> tuple[Tensor, Tensor, Tensor]:
        """-> logits f32 [S, V] of the sampling rows, hidden [T, D], flags i32 [4 S] (see `_flags`)."""
        results = self._forward(self._tables.to_device(padded.packed), padded.shape)
        torch_xla.sync()
        return results

    def _forward(self, packed: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        loaded, tables, decoder = self._loaded, self._tables, self._loaded.decoder
        part = unpack(packed, shape)
        for group in range(shape.groups):
            tables.change_pages(group, *(part[f"delta_{name}{group}"] for name in ("slots", "columns", "pages")))
        slots, token_rows = part["slots"].long(), part["token_rows"].long()
        valid = torch.arange(shape.tokens, device=packed.device) < part["num_tokens"]
        known = part["token_ids"].long()
        ids = torch.where(known == -1, tables.last_token[slots[token_rows]], known)
        outside = valid & ((ids < 0) | (ids >= decoder.spec.vocab_size))
        works = self._works(part, slots, token_rows, valid)
        caches = list(loaded.caches)
        ids, positions = ids.clamp(0, decoder.spec.vocab_size - 1), part["positions"].long()
        hidden, caches = decoder(ids, positions, caches, loaded.places, works)
        for cache, changed in zip(loaded.caches, caches, strict=True):
            cache.copy_(changed)
        logits = decoder.logits(hidden[part["logit_rows"].long()])
        tokens = argmax(logits)
        target = torch.where(part["greedy"] != 0, part["logit_slots"].long(), loaded.config.max_slots)
        tables.last_token[target] = tokens
        tables.num_outputs[target] += 1
        nan = valid & ~hidden.sum(dim=1, dtype=torch.float32).isfinite()
        bad, broken = (rows_with(flags, token_rows, shape.rows) for flags in (outside, nan))
        return logits, hidden, self._flags(tokens, logits, torch.cat((bad, broken)))

    def _flags(self, tokens: Tensor, logits: Tensor, others: Tensor) -> Tensor:
        """i32 [4 S]: sampled ids and a flag of logits not finite, of the sampling rows; then, of all rows, flags of
        bad token ids and of hidden states not finite."""
        unfit = ~(logits < torch.inf).all(dim=1)  # NaN is not less either; -inf is lawful
        return torch.cat((tokens.int(), unfit.int(), others))

    def _works(self, part: dict[str, Tensor], slots: Tensor, token_rows: Tensor, valid: Tensor) -> list[Work]:
        inside = torch.arange(len(valid), device=valid.device) - part["starts"][token_rows]
        index = part["num_computed"][token_rows] + inside  # each token's in its sequence
        works = []
        for nth, group in enumerate(self._loaded.layout.groups):
            page, table = group.page_tokens, self._tables.pages[nth][slots]
            column = torch.where(valid, index // page, 0)
            held = torch.where(valid, table[token_rows, column.long()], 0)
            arrays = part | {"page_table": table, "query_starts": part["starts"], "decode_order": part["order"]}
            arrays |= {"write_page": held.int(), "write_offset": (index % page).int()}
            works.append(self._work(group.page_tokens, self._kernels[nth], [arrays[name] for name in ROWS]))
        return works

    def _work(self, page_tokens: int, kernel: str, rows: list[Tensor]) -> Work:
        def attention(
            q: Tensor, k: Tensor, v: Tensor, cache: Tensor, layer_index: int, **limits: Any
        ) -> tuple[Tensor, Tensor]:
            tensors = (q, k, v, cache, self._layers[layer_index], *rows)
            out, cache = self._bridge(attend, tensors, kernel=kernel, page_tokens=page_tokens, **limits)
            return out, cache

        return Work(
            page_tokens=page_tokens,
            page_table=rows[0],
            query_starts=(),
            num_new=(),
            num_computed=(),
            write_at=rows[5],
            index=rows[6],
            decodes=(),
            attention=attention,
        )

    def _sample(self, logits: Tensor, slots: np.ndarray, mask: Tensor | None, flags: Tensor) -> Tensor:
        """flags with what was sampled. slots: i32 [S]; mask: bool [S, V], None: all are allowed."""
        mask = self._no_mask[len(slots)] if mask is None else mask
        result = self._drawn(logits, self._tables.to_device(slots.astype(np.int64)), mask, flags)
        torch_xla.sync()
        return result

    def _drawn(self, logits: Tensor, slots: Tensor, mask: Tensor, flags: Tensor) -> Tensor:
        tokens = pick(logits, slots, mask, self._tables, EVERYTHING)
        self._tables.advance(slots, tokens)
        return self._flags(tokens, logits, flags[2 * len(slots) :])

    def _score(self, logits: Tensor, flags: Tensor) -> Scores:
        """Raw log-probabilities of what was sampled, with as many of the likeliest as are ever wanted."""
        scores = score(logits, flags[: len(logits)].long(), self._num_top)
        torch_xla.sync()
        return scores

    def _score_all(self, hidden: Tensor, tokens: np.ndarray, targets: np.ndarray) -> list[Scores]:
        """Scores of prompt tokens, a piece a call; the last is padded."""
        size, vocab = self._score_rows, self._loaded.decoder.spec.vocab_size
        pieces = []
        for start in range(0, len(targets), size):
            wanted = np.zeros((2, size), np.int64)
            some = slice(start, start + size)
            wanted[0, : len(tokens[some])] = tokens[some]
            wanted[1, : len(tokens[some])] = np.clip(targets[some], 0, vocab - 1)
            pieces.append(self._score_tokens(hidden, self._tables.to_device(wanted)))
            torch_xla.sync()
        return pieces

    def _score_tokens(self, hidden: Tensor, wanted: Tensor) -> Scores:
        return score(self._loaded.decoder.logits(hidden[wanted[0]]), wanted[1], self._num_top)


def copy_pages(cache: Tensor, source: Tensor, target: Tensor, tokens: Tensor) -> None:
    """Copy the first tokens of pages, in all layers. cache: [L, P, ..., page, lanes]; the others: i32 [COPIES]."""
    place = torch.arange(cache.shape[-2], device=cache.device)[:, None]
    kept = place < tokens.view(1, -1, *(1,) * (cache.dim() - 2))  # [1, COPIES, ..., page, 1]
    source, target = source.long(), target.long()
    cache[:, target] = torch.where(kept, cache[:, source], cache[:, target])


def rows_with(flags: Tensor, token_rows: Tensor, rows: int) -> Tensor:
    """i32 [S]: 1 for rows with any flagged token. flags: bool [T]; token_rows: i64 [T]."""
    own = token_rows[:, None] == torch.arange(rows, device=flags.device)
    return (own & flags[:, None]).any(dim=0).int()
