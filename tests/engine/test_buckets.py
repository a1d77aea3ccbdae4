"""Token buckets by cost: exact, never worse than powers of two, and what resolve makes of them on a TPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.buckets import (
    TOKEN_BUCKETS,
    StepCost,
    candidates,
    choose_buckets,
    most_turns,
    powers_to,
    slowdown,
    step_cost,
)
from engine.capacity.parts import device_info
from engine.config import EngineConfig, ScheduleConfig
from engine.resolve import resolve
from engine.specs.arch import ArchSpec
from engine.specs.chips import CHIPS, Chip, chip_of
from tests.engine.test_resolve import arch

TPUS = [chip for chip in CHIPS if chip.kind == "tpu"]
COSTS = st.builds(
    StepCost,
    weights_s=st.floats(1e-5, 2e-2),
    token_s=st.floats(1e-8, 1e-4),
    head_s=st.floats(0, 1e-5),
    logits_s=st.floats(0, 1e-4),
    max_rows=st.integers(1, 256),
)


def powers(rows: int, tokens: int) -> tuple[int, ...]:
    return tuple(sorted({*powers_to(1, rows), *powers_to(64, tokens)}))


def wide(arch: ArchSpec) -> ArchSpec:
    """A model whose weights are worth reading."""
    layers = tuple(replace(layer, ffn=replace(layer.ffn, size=65536)) for layer in arch.layers)
    return replace(arch, hidden_size=4096, layers=layers * 8)


@settings(max_examples=150, deadline=None)
@given(cost=COSTS, rows=st.sampled_from([1, 8, 100, 256]), tokens=st.sampled_from([256, 300, 2048, 8192]))
def test_never_worse_than_as_many_powers_of_two(cost: StepCost, rows: int, tokens: int) -> None:
    plain = powers(rows, tokens)
    chosen = choose_buckets(cost, (rows, tokens), len(plain))
    assert slowdown(cost, chosen) <= slowdown(cost, plain) * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(cost=COSTS, rows=st.integers(1, 300), tokens=st.integers(300, 3000), most=st.integers(2, 14))
def test_ascending_within_the_budget_with_what_is_required(cost: StepCost, rows: int, tokens: int, most: int) -> None:
    chosen = choose_buckets(cost, (rows, tokens), most)
    assert list(chosen) == sorted(set(chosen)) and len(chosen) <= most
    assert {rows, tokens} <= set(chosen) and chosen[-1] == tokens
    more = choose_buckets(cost, (rows, tokens), most + 1)
    assert slowdown(cost, more) <= slowdown(cost, chosen) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(cost=COSTS, required=st.sampled_from([(40,), (7, 40), (33, 40)]), most=st.integers(2, 4))
def test_the_best_of_all_choices(cost: StepCost, required: tuple[int, ...], most: int) -> None:
    """Against trying every set of candidates."""
    others = [size for size in candidates(required) if size not in required]
    sets = [
        tuple(sorted({*required, *more})) for n in range(most - len(required) + 1) for more in combinations(others, n)
    ]
    best = min(slowdown(cost, chosen) for chosen in sets)
    assert slowdown(cost, choose_buckets(cost, required, most)) == pytest.approx(best)


def test_slowdown_by_hand() -> None:
    """Reading takes 4, a token 1: buckets of 4 and 8 pad steps of 5 to 7 tokens to 8."""
    cost = StepCost(weights_s=4, token_s=1, head_s=0, logits_s=0, max_rows=1)
    weights = [1 / tokens for tokens in range(1, 9)]
    wanted = (sum(weights[:4]) + sum(w * 8 / t for t, w in enumerate(weights[4:], 5))) / sum(weights)
    assert slowdown(cost, (4, 8)) == pytest.approx(wanted)
    assert choose_buckets(cost, (8,), 2) == (4, 8)


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_the_costs_of_a_chip(chip: Chip) -> None:
    """A step of few tokens costs what reading the weights costs, one of many what the products cost."""
    model = wide(arch())
    cost = step_cost(model, 2, 1, (chip.bandwidth, chip.flops["bfloat16"]), 8)
    numbers = cost.token_s * chip.flops["bfloat16"] / 2
    vocab = model.vocab_size * model.hidden_size
    norms = cost.weights_s * chip.bandwidth / 2 - numbers - vocab
    assert 0 < norms < numbers / 100
    knee = cost.weights_s / cost.token_s
    assert knee == pytest.approx(chip.flops["bfloat16"] / chip.bandwidth, rel=0.05)
    assert float(cost.seconds(1)) == pytest.approx(cost.weights_s, rel=0.01)
    assert float(cost.seconds(8192)) == pytest.approx(8192 * cost.token_s, rel=0.05)


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_what_a_tpu_resolves_to(chip: Chip) -> None:
    """Fewer programs than powers of two, at a smaller cost by the model; a name that nobody knows changes little."""
    model, device = wide(arch()), device_info(chip)
    runner = resolve(EngineConfig(), model, device).runner
    cost = step_cost(model, 2, 1, (chip.bandwidth, chip.flops["bfloat16"]), runner.max_slots)
    plain = powers(runner.max_slots, runner.max_batched_tokens)
    assert len(runner.token_buckets) <= TOKEN_BUCKETS < len(plain)
    assert slowdown(cost, runner.token_buckets) < slowdown(cost, plain)
    assert runner.row_buckets == tuple(size for size in runner.token_buckets if size <= runner.max_slots)
    assert runner.row_buckets[-1] == runner.max_slots and runner.token_buckets[-1] == runner.max_batched_tokens
    named = resolve(EngineConfig(), model, replace(device, name=chip.jax_name)).runner
    assert named == runner
    assert resolve(EngineConfig(), model, replace(device, name="TPU v99")).runner.token_buckets


def test_small_limits() -> None:
    device = device_info(TPUS[0])
    for seqs, tokens in ((1, 1), (1, 64), (8, 8), (3, 100)):
        schedule = ScheduleConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
        runner = resolve(EngineConfig(schedule=schedule), arch(), device).runner
        assert runner.row_buckets[-1] == seqs and runner.token_buckets[-1] == tokens
        assert len(runner.token_buckets) <= len(powers(seqs, tokens))


def test_as_many_turns_as_are_short() -> None:
    cost = StepCost(weights_s=0.0015, token_s=0, head_s=0, logits_s=0, max_rows=1)
    assert most_turns(cost, 8, 0.02) == 8
    assert most_turns(replace(cost, weights_s=0.009), 8, 0.02) == 2
    assert most_turns(replace(cost, weights_s=0.5), 8, 0.02) == 1


def test_names_of_chips() -> None:
    assert [chip_of(chip.jax_name) for chip in TPUS] == TPUS == [chip_of(chip.product) for chip in TPUS]
    assert chip_of("CPU") is None and chip_of("") is None
