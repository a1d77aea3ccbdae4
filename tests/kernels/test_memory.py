"""The memory plan of the fused path against what it allocates, in triton's interpreter: torch's own count of bytes."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch import memory
from backends.torch.gpu_sample import PIECE_BYTES, pick
from backends.torch.runner import Runner
from engine.opened import Use
from engine.runner import ON_DEMAND, RunnerConfig
from engine.specs.arch import ArchSpec
from engine.step import PromptLogprobs
from tests.backends.driver import Driver, llama

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU allocator's bytes")
TOKENS = 144  # more than the products of few rows take


def wide(vocab_size: int = 2000) -> ArchSpec:
    """Large enough for activations to stand out among small tensors."""
    spec = llama(vocab_size=vocab_size)
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, num_heads=8, head_size=32), ffn=replace(layer.ffn, size=512))
        for layer in spec.layers
    )
    return replace(spec, hidden_size=256, layers=layers)


def peak_of(run: Any) -> int:
    """Most bytes alive at once, beyond those that were there."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max(initial=0))


@pytest.mark.parametrize("invariant", [False, True])
def test_layers_take_what_was_planned(invariant: bool) -> None:
    driver = Driver(Runner(), wide(), max_batched_tokens=TOKENS, batch_invariant=invariant, warm=False)
    plan = driver.plan([(driver.new(driver.prompt(TOKENS // 3)), TOKENS // 3) for _ in range(3)])
    planned = memory.layers_bytes(driver.config, TOKENS)
    held = 0 if invariant else 4 * TOKENS * 256  # the interpreter keeps what its last launch read: a norm's result
    assert 0.95 * planned <= peak_of(lambda: driver.collect(driver.submit(plan))) <= planned + held


def test_scores_take_what_was_planned() -> None:
    """A step with logits of every row and of every prompt token."""
    driver = Driver(Runner(), llama(vocab_size=20_000), max_batched_tokens=24, warm=False)
    rows = [(driver.new(driver.prompt(2), num_logprobs=5, temperature=1.0, top_p=0.9), 2) for _ in range(12)]
    ids = np.arange(24, dtype=np.int32)
    plan = driver.plan(rows, prompt_logprobs=PromptLogprobs(token_idx=ids, targets=ids, num_top=3))
    logits = 4 * 12 * 20_000
    planned = memory.step_bytes(driver.config, 4) - logits - memory.ROUNDING_BYTES  # nothing is in flight before it
    planned += 2 * logits  # off a GPU a product leaves its result in another tensor first
    assert 0.9 * planned <= peak_of(lambda: driver.collect(driver.submit(plan))) <= planned


def test_weights_are_counted_to_the_byte() -> None:
    driver = Driver(Runner(), wide(), warm=False)
    held = sum(x.numel() * x.element_size() for x in tensors(driver.runner._decoder))
    assert 0 <= memory.weight_bytes(driver.config) - held <= 2 * memory.MIB + 512 * 32
    half = replace(driver.config, dtype="bfloat16")
    assert memory.weight_bytes(half) < 0.52 * memory.weight_bytes(driver.config)


def tensors(decoder: Any) -> list[torch.Tensor]:
    found = [decoder.embed, decoder.final_norm]
    for layer in decoder.layers:
        parts = [vars(x).values() for x in (layer, layer.mixer, layer.ffn)]
        found += [x for values in parts for x in values if isinstance(x, torch.Tensor)]
    return found


def test_graphs_and_tables_are_counted() -> None:
    driver = Driver(Runner(), wide(), max_batched_tokens=TOKENS, warm=False)
    config, work, tables = driver.config, driver.runner._work, driver.runner._tables
    graphs, mixed = work._graphs, work._mixed
    buffers = [graphs.logits, graphs._inputs, graphs._packed, graphs.bad, graphs.workspace.partials,
               graphs.workspace.counters, mixed._inputs, mixed._turns, mixed.few, mixed.flags]  # fmt: skip
    held = sum(x.numel() * x.element_size() for x in buffers)
    rest = memory.layers_bytes(config, TOKENS) + memory.SPLIT_BYTES
    assert held <= memory.graph_bytes(config, 12, 4) <= (held + rest) * 1.1 + 4 * memory.MIB
    held = sum(x.numel() * x.element_size() for x in (*tables.pages, *vars(tables).values()) if torch.is_tensor(x))
    assert held <= memory.table_bytes(config) <= held + 8 * 512


def test_lists_of_attention_are_counted() -> None:
    driver = Driver(Runner(), wide(), max_batched_tokens=TOKENS, warm=False)
    graphs, rows = driver.runner._work._graphs, 12
    ones = torch.ones(rows, dtype=torch.int32)
    held = sum(work.items.records.nbytes for work in graphs.works_of(ones, ones))
    assert 0 < held <= memory.item_bytes(driver.config.arch, rows, 4)


def test_captured_steps_take_what_was_planned() -> None:
    driver = Driver(Runner(), wide(), max_batched_tokens=TOKENS, warm=False)
    mixed = driver.runner._work._mixed
    planned = memory.shared_bytes(driver.config, TOKENS)
    held = 4 * TOKENS * 256  # the interpreter keeps what its last launch read
    with torch.inference_mode():
        assert 0.9 * planned <= peak_of(lambda: mixed._warm(TOKENS)) <= planned + held


def test_parts_follow_the_flags() -> None:
    driver = Driver(Runner(), wide(), warm=False)
    base = memory.plan(driver.config, 132)
    assert set(base) == {"weights", "activations", "graphs", "tables", ON_DEMAND, "libraries"}

    def part(name: str, **changes: Any) -> int:
        config: RunnerConfig = replace(driver.config, **changes)
        return memory.plan(config, 132)[name]

    assert part("activations", max_batched_tokens=8192) > base["activations"]
    assert part("activations", max_in_flight=1) < base["activations"]
    assert part(ON_DEMAND, max_slots=1024) > base[ON_DEMAND]
    assert part("tables", max_model_len=1 << 17) > base["tables"]
    assert part("weights", max_slots=1024) == base["weights"]


def test_processors_copy_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And choose what they would choose of all rows together."""
    driver = Driver(Runner(), llama(), warm=False)
    tables = driver.runner._tables
    tables.counts = tables._full(1, torch.int32, 199)
    tables.repetition_penalty[:] = 1.3
    logits, slots = torch.randn(7, 199), torch.arange(7)
    mask = torch.rand(7, 199) < 0.5
    uses = Use.PENALTIES | Use.MASK
    whole = pick(logits, slots, mask, tables, uses)
    assert PIECE_BYTES > 4 * 7 * 199
    monkeypatch.setattr("backends.torch.gpu_sample.PIECE_BYTES", 4 * 199 * 3)
    assert torch.equal(pick(logits, slots, mask, tables, uses), whole)
    assert torch.equal(pick(logits, slots, None, tables, Use.PENALTIES), pick(logits, slots, mask | True, tables, uses))
