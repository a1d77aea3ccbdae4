"""The set of programs of one runner, the device state they hand on, and how each is called.

`ProgramSet` knows which shapes are reachable: one forward program a token bucket (rows padded to the most that such a
step can have), one sampling program a row count, and a handful of updates. Letters: T tokens · S rows · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from backends.jax import sample, tables, turns, updates
from backends.jax.batch import Packer, Shape, packed_size
from backends.jax.cache import COPIES, cache_shapes, copy_pages, shardings
from backends.jax.compile import Name, Program, Programs
from backends.jax.decoders import Traits, make_decoder
from backends.jax.forward import HEAD_ROWS, Spread, forward, split_forward
from backends.jax.replicas import spread, together
from backends.jax.split import AXIS, DATA, Split, specs_of
from backends.jax.stacks import stack_places
from engine.runner import Progress, RunnerConfig
from engine.specs.cache import CacheLayout
from engine.specs.parallel import rank_arch
from engine.step import I32, U32, Bucket
from pallas_kernels import dispatch
from pallas_kernels.int8_pages import Cache

SCORE_BYTES = 64 << 20
"""Most scratch memory of one call that scores prompt tokens."""


SAMPLED = 64
"""Most rows that are sampled together on an accelerator: each takes a few arrays as wide as the vocabulary."""
SAMPLED_IN_TURN = 16
"""The same behind a forward pass in one program, where libtpu gives each twice as many of those arrays."""


SPLIT_TOKENS = 256
"""Fewer tokens are summed whole: a decode step's collectives are short, and two take longer to begin than one."""


HELD_ON = ("gpu",)
"""Where a step's results lie in those of the step before. XLA's graphs hold addresses: were results elsewhere each
time, scratch would be too, and the host would write each launch anew (2 ms of a step of 1 ms on an H200)."""


@dataclass(slots=True)
class DeviceState:
    """What programs hand on: each call takes these arrays and puts new ones in their place."""

    caches: list[Cache]
    rows: tables.Rows
    tables: tables.Tables
    logits: dict[int, jax.Array]  # by S, of the last forward program of so many rows; none but where HELD_ON says
    hidden: dict[int, jax.Array]  # by T


def split_tokens(platform: str) -> int:
    """From how many tokens on a step is split over ranks between products (Traits)."""
    return SPLIT_TOKENS if platform == "tpu" else 0


def score_rows(vocab_size: int) -> int:
    """Prompt tokens scored by one call: bounded by bytes, three arrays as wide as the vocabulary each."""
    return int(np.clip(SCORE_BYTES // (12 * vocab_size), 8, 64))


def sampled_together(rows: int, most: int) -> int:
    """The largest part of `rows` up to `most` that divides them."""
    return max(part for part in range(1, min(rows, most) + 1) if rows % part == 0)


class ProgramSet:
    """params: arrays, or their shapes where programs are only listed. load: see Programs."""

    def __init__(
        self,
        config: RunnerConfig,
        layout: CacheLayout,
        params: dict[str, Any],
        split: Split,
        load: Callable[[Program], Any] | None = None,
    ) -> None:
        self.layout = layout
        self._config = config
        self._params = params
        self._split = split
        self._compiled = Programs(split, load)
        self._least = dispatch.least_rows(split.platform, config.dtype)
        self._traits = Traits(
            arch=config.arch,
            part=rank_arch(config.arch, split.size),
            layout=layout,
            max_model_len=config.max_model_len,
            kernels=tuple(
                dispatch.kernel_for(split.platform, group.spec.head_size, layout.kv_dtype) for group in layout.groups
            ),
            null_slot=config.max_slots,
            block_rows=self._block_rows(),
            ranks=split.size,
            split_tokens=split_tokens(split.platform),
            stacks=stack_places(config.arch),
        )
        self._packers = {
            tokens: Packer(self.shape(tokens), config.max_slots) for tokens in sorted(set(config.token_buckets))
        }
        self._rows = {packer.shape.tokens: packer.shape.rows for packer in self._packers.values()}
        self._no_mask: dict[int, jax.Array] = {}

    @property
    def num_compiles(self) -> int:
        return self._compiled.num_compiles

    @staticmethod
    def workspace_bytes(config: RunnerConfig) -> int:
        """An upper estimate of what the largest step needs beside weights and cache."""
        arch, tokens, rows = config.arch, max(config.token_buckets), max(config.row_buckets)
        widest = max(
            8 * arch.hidden_size
            + 6 * layer.ffn.size
            + 4 * (layer.mixer.num_heads + 2 * layer.mixer.num_kv_heads) * layer.mixer.head_size
            for layer in arch.layers
        )
        slots = config.max_slots + 1
        sampler = slots * (4 * arch.vocab_size + arch.vocab_size // 8 + 24_000)
        logits = (8 * rows + 24 * min(rows, SAMPLED)) * arch.vocab_size
        return 4 * tokens * widest + logits + sampler + SCORE_BYTES

    # shapes

    def shape(self, bucket_tokens: int) -> Shape:
        """The forward program that serves a token bucket: its rows are the most that so few tokens can have."""
        tokens = max(bucket_tokens, self._least)
        rows = max(self._least, min(tokens, max(self._config.row_buckets)))
        if rows > HEAD_ROWS:
            rows = -(-rows // HEAD_ROWS) * HEAD_ROWS
        return Shape(tokens, rows, len(self.layout.groups))

    def _block_rows(self) -> int:
        """A GPU asks the host which way to go where a program branches: longer than padding's logits take."""
        if self._split.platform == "gpu":
            return 0
        return HEAD_ROWS if self._split.platform == "cpu" else max(self._config.row_buckets) + HEAD_ROWS

    def packer(self, bucket: Bucket) -> Packer:
        return self._packers[bucket.tokens]

    def _max_pages(self) -> tuple[int, ...]:
        return tuple(-(-self._config.max_model_len // group.page_tokens) for group in self.layout.groups)

    def _table_shapes(self) -> tuple[tables.Rows, tables.Tables]:
        config = self._config
        return tables.table_shapes(config.max_slots, config.arch.vocab_size, self._max_pages(), config.sampler_limits)

    def fresh_state(self) -> DeviceState:
        """Empty pages and tables, made on the device: memory that was handed over from the host cannot be donated."""
        program = spread(self._fresh_program(), self._split)
        if program.name not in self._compiled:
            self._compiled.compile([program], lambda done: None)
        return DeviceState(*self._compiled[program.name]())

    def _fresh_program(self) -> Program:
        caches, whole = cache_shapes(self.layout, self._split), self._split.sharding()
        shapes = (caches, *self._table_shapes(), *self._held())
        return Program(
            ("fresh",),
            lambda: jax.tree_util.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            (),
            outs=(shardings(caches), whole, whole, whole, whole),
        )

    def _held(self) -> tuple[dict[int, jax.ShapeDtypeStruct], dict[int, jax.ShapeDtypeStruct]]:
        """Results that forward programs take over from the one before: logits by S, hidden states by T."""
        if self._split.platform not in HELD_ON or len(self._split.devices) > 1:
            return {}, {}
        shapes, width = [packer.shape for packer in self._packers.values()], self._config.arch.hidden_size
        hidden = {shape.tokens: self._split.shape((shape.tokens, width), self._config.dtype) for shape in shapes}
        return {shape.rows: self.logits(shape.rows) for shape in shapes}, hidden

    # compiling

    def programs(self) -> list[Program]:
        """All that a runner of this configuration may call."""
        programs = [
            self._fresh_program(),
            *self._forward_programs(),
            *self._sample_programs(),
            *self._turn_programs(),
            *self._update_programs(),
        ]
        return [spread(program, self._split) for program in programs]

    def compile(self, progress: Progress) -> None:
        programs = [program for program in self.programs() if program.name not in self._compiled]
        self._compiled.compile(programs, lambda done: progress("warm_up", done, len(programs)))
        words = -(-self._config.arch.vocab_size // 32)
        for packer in self._packers.values():
            rows = packer.shape.rows
            zeros = np.zeros((rows * self._split.replicas, words), np.uint32)
            self._no_mask[rows] = jax.device_put(zeros, self._split.sharding(PartitionSpec(DATA)))

    def _forward_programs(self) -> list[Program]:
        rows, _ = self._table_shapes()
        caches = cache_shapes(self.layout, self._split)
        whole, held = self._split.sharding(), shardings(caches)
        hidden, vocab, dtype = self._config.arch.hidden_size, self._config.arch.vocab_size, self._config.dtype
        chunk = score_rows(vocab)
        held_logits, held_hidden = self._held()
        programs: dict[Name, Program] = {}
        for packer in self._packers.values():
            shape = packer.shape
            packed = jax.ShapeDtypeStruct((packed_size(shape),), np.int32)
            name: Name = ("forward", shape.tokens)
            args, outs = (self._params, caches, rows, packed), (held, whole, self.logits().sharding, whole, whole)
            if held_logits:
                args = (*args, held_logits[shape.rows], held_hidden[shape.tokens])
            donate = (1, 2, *range(4, len(args)))
            programs[name] = Program(name, self._forward(shape, caches), args, donate=donate, outs=outs)
            states = jax.ShapeDtypeStruct((shape.tokens, hidden), dtype)
            index = jax.ShapeDtypeStruct((chunk,), np.int32)
            name = ("take", shape.tokens)
            programs[name] = Program(name, lambda states, index: states[index], (states, index))
        states, targets = jax.ShapeDtypeStruct((chunk, hidden), dtype), jax.ShapeDtypeStruct((chunk,), np.int32)
        programs[("score",)] = Program(("score",), self._score, (self._params, states, targets))
        return list(programs.values())

    def _forward(self, shape: Shape, caches: list[Any]) -> Any:
        if self._split.size == 1:
            return partial(forward, traits=self._traits, shape=shape)
        mesh = self._split.mesh if self._split.replicas == 1 else None
        lies = Spread(mesh, specs_of(self._params), specs_of(caches))
        return partial(split_forward, traits=self._traits, shape=shape, spread=lies)

    def build(self, program: Program) -> Any:
        """Compiled, and not kept."""
        return self._compiled.build(program)

    def logits(self, rows: int = 1) -> jax.ShapeDtypeStruct:
        """f32 [S, V], the vocabulary split over the devices and padded to equal parts."""
        width = -(-self._config.arch.vocab_size // self._split.size) * self._split.size
        return self._split.shape((rows, width), np.float32, PartitionSpec(None, AXIS))

    def _score(self, params: dict[str, Any], states: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        decoder = make_decoder(params, self._traits, states.shape[0])
        logits = decoder.logits(states)[:, : self._config.arch.vocab_size]
        return sample.score(logits, targets, self._config.sampler_limits.max_logprobs)

    def _sample_programs(self) -> list[Program]:
        rows, sampler = self._table_shapes()
        vocab = self._config.arch.vocab_size
        programs = []
        for size in sorted({packer.shape.rows for packer in self._packers.values()}):
            args = (
                self.logits(size),
                rows,
                sampler,
                jax.ShapeDtypeStruct((2 + size,), np.int32),
                jax.ShapeDtypeStruct((size, -(-vocab // 32)), np.uint32),
            )
            function = partial(self._sampling, shape=self._sampled(size, SAMPLED))
            programs.append(Program(("sample", size), function, args, donate=(1, 2)))
        return programs

    def _sampled(self, rows: int, most: int) -> sample.Sampled:
        """most: rows sampled together on an accelerator."""
        split, config = self._split, self._config
        return sample.Sampled(
            block=HEAD_ROWS if split.platform == "cpu" else sampled_together(rows, most),
            num_top=config.sampler_limits.max_logprobs,
            likely=dispatch.choose_likely(split.platform, config.arch.vocab_size, len(split.devices)),
            ranks=split.size,
            mesh=split.mesh if split.size > 1 and split.replicas == 1 else None,
        )

    def _turn_programs(self) -> list[Program]:
        """Several turns of decode steps, a program a bucket that such a step can have."""
        config, whole = self._config, self._split.sharding()
        if config.max_num_steps == 1:
            return []
        rows, sampler = self._table_shapes()
        caches = cache_shapes(self.layout, self._split)
        outs = (shardings(caches), whole, whole, whole, whole)
        most_rows = min(config.max_turn_rows, max(config.row_buckets))
        largest = min(tokens for tokens in self._packers if tokens >= most_rows)
        programs = {}
        for shape in (packer.shape for tokens, packer in self._packers.items() if tokens <= largest):
            loop = turns.Loop(
                forward=self._forward(shape, caches),
                shape=shape,
                most=config.max_num_steps,
                null_slot=config.max_slots,
                vocab_size=config.arch.vocab_size,
                sampled=self._sampled(shape.rows, SAMPLED_IN_TURN),
                replicas=self._split.replicas,
            )
            packed = jax.ShapeDtypeStruct((packed_size(shape),), np.int32)
            control = jax.ShapeDtypeStruct((turns.CONTROLS,), np.int32)
            name: Name = ("turns", shape.tokens)
            args = (self._params, caches, rows, sampler, packed, control)
            programs[name] = Program(name, partial(turns.several_turns, loop=loop), args, donate=(1, 2, 3), outs=outs)
        return list(programs.values())

    def _sampling(
        self, logits: jax.Array, rows: tables.Rows, sampler: tables.Tables, *args: Any, **options: Any
    ) -> Any:
        if self._split.size > 1:
            # else XLA splits the tables as it splits the logits, and gathers all of them at the end of each step
            place = self._split.sharding() if self._split.replicas == 1 else PartitionSpec()
            sampler = jax.lax.with_sharding_constraint(sampler, place)
        return sample.sampling(logits[:, : self._config.arch.vocab_size], rows, sampler, *args, **options)

    def _update_programs(self) -> list[Program]:
        rows, sampler = self._table_shapes()
        limits, vocab = self._config.sampler_limits, self._config.arch.vocab_size

        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.int32)

        def floats(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.float32)

        one, bias, words, width = ints(1), limits.max_logit_bias, limits.max_bad_words, limits.max_bad_word_len - 1
        opened = (
            ints(updates.OPENED, tables.OPEN_INTS + limits.max_stop_ids),
            floats(updates.OPENED, len(tables.SCALARS_F32)),
        )
        allowed = jax.ShapeDtypeStruct((-(-vocab // 32),), np.uint32)
        extras: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "open_bias": (tables.open_bias, (one, ints(bias), floats(bias))),
            "open_allowed": (tables.open_allowed, (one, allowed)),
            "open_bad_words": (tables.open_bad_words, (one, ints(words, width), ints(words), ints(width))),
            "open_counts": (tables.open_counts, (one, one, ints(updates.HISTORY), one)),
        }
        programs = [Program(("open",), tables.open_rows, (rows, sampler, *opened), donate=(0, 1))]
        programs += [
            Program((name,), function, (sampler, *args), donate=(0,)) for name, (function, args) in extras.items()
        ]
        for group in range(len(self.layout.groups)):
            function = partial(set_group_pages, group)
            programs.append(Program(("pages", group), function, (rows, ints(3, updates.DELTAS)), donate=(0,)))
        for pool, cache in enumerate(cache_shapes(self.layout, self._split)):
            args = (cache, ints(3, COPIES))
            programs.append(Program(("copy", pool), copy_pages, args, donate=(0,), outs=shardings(cache)))
        return programs

    # calls

    def update(self, state: DeviceState, name: Name, arrays: tuple[Any, ...]) -> None:
        """Run one update program (see backends/jax/updates.py)."""
        program = self._compiled[name]
        match name[0]:
            case "open":
                state.rows, state.tables = program(state.rows, state.tables, *arrays)
            case "pages":
                state.rows = program(state.rows, *arrays)
            case "copy":
                state.caches[name[1]] = program(state.caches[name[1]], *arrays)
            case _:
                state.tables = program(state.tables, *arrays)

    def forward(self, state: DeviceState, tokens: int, packed: I32) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> logits f32 [S, V], hidden [T, D], flags i32 [3, S]."""
        program, rows = self._compiled["forward", tokens], self._rows[tokens]
        held = (state.logits[rows], state.hidden[tokens]) if state.logits else ()
        state.caches, state.rows, logits, hidden, flags = program(self._params, state.caches, state.rows, packed, *held)
        if held:
            state.logits[rows], state.hidden[tokens] = logits, hidden
        return logits, hidden, flags

    def turns(
        self, state: DeviceState, tokens: int, packed: I32, control: I32
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """-> i32 [S, k + ENDS] as turns.several_turns says, raw log-probabilities [S, k, ..]."""
        program = self._compiled["turns", tokens]
        arrays = self._params, state.caches, state.rows, state.tables
        state.caches, state.rows, state.tables, sampled, scores = program(*arrays, packed, control)
        return sampled, scores

    def sample(
        self, state: DeviceState, logits: jax.Array, rows: Sequence[tuple[I32, U32 | None]], uses: sample.Use
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """-> ids i32 [S] and scores of the sampling rows. rows: of each replica slots [n], and a mask u32 [n, W]."""
        size = logits.shape[0] // len(rows)
        packed = np.full((len(rows), 2 + size), self._config.max_slots, np.int32)
        # equal on all replicas, so that their loops and conditions go the same way
        packed[:, 0], packed[:, 1] = uses, max(len(slots) for slots, _ in rows)
        for own, (slots, _) in zip(packed, rows, strict=True):
            own[2 : 2 + len(slots)] = slots
        bits: Any = self._no_mask[size]
        if any(mask is not None for _, mask in rows):
            bits = np.full(bits.shape, 0xFFFFFFFF, np.uint32)
            for replica, (slots, mask) in enumerate(rows):
                if mask is not None:
                    bits[replica * size : replica * size + len(slots)] = mask
        program = self._compiled["sample", size]
        arrays = state.rows, state.tables, packed.reshape(-1), bits
        state.rows, state.tables, ids, scores = program(logits, *arrays)
        return ids, scores

    def score(self, hidden: jax.Array, tokens: int, wanted: Sequence[tuple[I32, I32]]) -> list[Any]:
        """Scores of prompt tokens, a chunk of each replica a call. wanted: of each token indexes and targets, [M]."""
        chunk = score_rows(self._config.arch.vocab_size)
        take, score = self._compiled["take", tokens], self._compiled[("score",)]
        pieces = []
        for start in range(0, max(len(index) for index, _ in wanted), chunk):
            index, targets = ([padded(each[at][start : start + chunk], chunk) for each in wanted] for at in (0, 1))
            clipped = np.clip(together(targets), 0, self._config.arch.vocab_size - 1)
            pieces.append(score(self._params, take(hidden, together(index)), clipped))
        return pieces

    def held_bytes(self) -> int:
        """Of the results that forward programs hand on."""
        shapes = jax.tree_util.tree_leaves(self._held())
        return sum(math.prod(shape.shape) * np.dtype(shape.dtype).itemsize for shape in shapes)

    def temp_bytes(self, name: Name) -> int:
        return self._compiled.temp_bytes(name)


def padded(values: I32, size: int) -> I32:
    """With zeros behind."""
    return np.concatenate([values, np.zeros(size - len(values), np.int32)])


def set_group_pages(group: int, rows: tables.Rows, parts: jax.Array) -> tables.Rows:
    return tables.set_pages(rows, group, *jnp.unstack(parts))
