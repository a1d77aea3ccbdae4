"""The random sampler's kernels under the Triton interpreter, against backends/torch/sample.py: the same tokens."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported first
pytest.importorskip("triton")

from backends.torch import sample as plain
from cuda_kernels import sampler
from tests.kernels.compiled import compile_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
NAMES = ("temperature", "min_p", "top_k", "top_p", "seed", "num_outputs")


def table_of(rows: list[tuple[float, float, int, float]], seed: int = 5) -> dict[str, torch.Tensor]:
    """The tables of slots 0.. with (temperature, min_p, top_k, top_p) each, and one for padding."""
    columns = list(zip(*rows, (0.0, 0.0, 0, 1.0), strict=True))
    random = torch.Generator().manual_seed(seed)
    count = len(rows) + 1
    table = {
        "temperature": torch.tensor(columns[0]), "min_p": torch.tensor(columns[1]),
        "top_k": torch.tensor(columns[2]), "top_p": torch.tensor(columns[3]),
        "seed": torch.randint(0, 2**32, (count, 2), generator=random),
        "num_outputs": torch.randint(0, 5000, (count,), generator=random),
    }  # fmt: skip
    return {name: part.to(DEVICE) for name, part in table.items()}


def expected(x: torch.Tensor, slots: torch.Tensor, table: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the torch sampler answers. x: f32 [S, V]."""
    heat = table["temperature"][slots][:, None]
    warm = x / torch.where(heat > 0, heat, 1.0)
    warm = plain.keep_likely(warm, table["min_p"][slots])
    warm = plain.keep_top_k(warm, table["top_k"][slots])
    warm = plain.keep_top_p(warm, table["top_p"][slots])
    noise = plain.gumbel(table["seed"][slots], table["num_outputs"][slots], x.shape[1])
    return plain.argmax(torch.where(heat > 0, warm + noise, x))


def check(x: torch.Tensor, rows: list[tuple[float, float, int, float]], seed: int = 5) -> None:
    table = table_of(rows, seed)
    slots = torch.arange(len(rows), device=DEVICE).flip(0)
    tokens, unfit = sampler.sample(x, slots, *(table[name] for name in NAMES))
    assert torch.equal(tokens, expected(x.float(), slots, table))
    assert torch.equal(unfit > 0, ~(x < torch.inf).all(dim=1))


FILTERS = [
    (0.0, 0.0, 0, 1.0), (1.0, 0.0, 0, 1.0), (0.7, 0.0, 50, 1.0), (1.3, 0.0, 0, 0.9), (0.8, 0.0, 40, 0.95),
    (1.0, 0.1, 0, 1.0), (1.0, 0.05, 20, 0.8), (2.0, 0.0, 1, 1.0), (1.0, 0.0, 3000, 0.9), (0.5, 0.0, 1500, 1.0),
    (1.0, 0.3, 0, 0.5), (1.0, 1e-4, 0, 1.0), (1.0, 0.0, 10**6, 1.0), (0.0, 0.5, 3, 0.1),
]  # fmt: skip


def peaked(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Logits as a model's are: few are likely. f32 [rows, vocab]"""
    random = torch.Generator().manual_seed(seed)
    return (-torch.rand(rows, vocab, generator=random).mul_(vocab).add_(1).log() * 2.5).to(DEVICE)


@pytest.mark.parametrize("vocab", [40, 700, 9001])
@pytest.mark.parametrize("kind", ["flat", "peaked", "steps"])
def test_the_tokens_are_those_of_torch(kind: str, vocab: int) -> None:
    x = peaked(len(FILTERS), vocab, 1)
    if kind == "flat":
        x = torch.randn(len(FILTERS), vocab, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    elif kind == "steps":
        x = x.round()  # many equals at every threshold
    check(x, FILTERS, seed=vocab)


def test_rows_that_need_a_second_gathering_or_min_p_before_top_p() -> None:
    rows = [(1.6, 0.0, 0, 0.9), (1.0, 1e-3, 0, 0.95), (1.7, 2e-4, 0, 0.9), (1.0, 0.0, 0, 0.99), (4.0, 3e-3, 0, 0.7)]
    for seed in range(3):
        check(peaked(len(rows), 40000, seed), rows, seed)


def test_logits_of_16_bits_and_rows_with_strides() -> None:
    x = peaked(len(FILTERS), 4200, 3)[:, :4100]
    check(x, FILTERS)
    check(x.bfloat16(), FILTERS)


def test_masked_rows_keep_to_what_is_left() -> None:
    x = torch.full((len(FILTERS), 5000), -INF, device=DEVICE)
    x[:, [3, 4999, 1200]] = torch.tensor([0.5, 1.0, -2.0], device=DEVICE)
    check(x, FILTERS)
    check(torch.full_like(x, -INF), FILTERS)  # nothing is left: id 0


def test_rows_at_fault_are_flagged_and_the_others_are_as_before() -> None:
    x = peaked(len(FILTERS), 5000, 4)
    table, slots = table_of(FILTERS), torch.arange(len(FILTERS), device=DEVICE)
    before = sampler.sample(x, slots, *(table[name] for name in NAMES))[0]
    x[3, 70], x[4, 4999], x[5], x[1, 0] = float("nan"), INF, float("nan"), INF
    tokens, unfit = sampler.sample(x, slots, *(table[name] for name in NAMES))
    assert unfit.nonzero().flatten().tolist() == [1, 3, 4, 5]
    assert torch.equal(tokens[unfit == 0], before[unfit == 0])
    assert ((tokens >= 0) & (tokens < 5000)).all()


def test_a_row_answers_alone_as_in_company() -> None:
    x = peaked(len(FILTERS), 5000, 6)
    table, slots = table_of(FILTERS), torch.arange(len(FILTERS), device=DEVICE)
    together = sampler.sample(x, slots, *(table[name] for name in NAMES))[0]
    alone = [sampler.sample(x[i : i + 1], slots[i : i + 1], *(table[name] for name in NAMES))[0] for i in slots]
    assert torch.equal(together, torch.cat(alone))


def test_they_compile_for_both_architectures() -> None:
    rows = {"x": "*fp32", "slots": "*i64", "temperature": "*fp32", "min_p": "*fp32", "top_k": "*i64", "top_p": "*fp32"}
    rows |= {"seed": "*i64", "num_outputs": "*i64", "stride": "i32", "floats": "*fp32"}
    more = {"keys": "*i64", "flags": "*i32"}
    last = {"integers": "*i32", "tokens": "*i64"}
    sizes = {"TILES": 63, "SUBS": 2016, "ROOM": sampler.ROOM, "vocab": 128256}
    kernels = [
        ("survey_kernel", rows | more, sizes | {"TILE": sampler.TILE, "FAST": True}, 4),
        ("choose_kernel", rows | more | last | {"unfit": "*i32"}, sizes | {"TILE_BLOCK": 64, "SUB_BLOCK": 2048}, 4),
        ("search_kernel", rows | last, sizes | {"SUB_BLOCK": 2048, "BLOCK": sampler.SEARCH_BLOCK}, 16),
    ]
    wanted = [
        ("cuda_kernels.sampler", name, types, constants, arch, {"num_warps": warps})
        for name, types, constants, warps in kernels
        for arch in (80, 90)
    ]
    for made in compile_kernels(wanted):
        assert made["shared"] < 48 << 10
