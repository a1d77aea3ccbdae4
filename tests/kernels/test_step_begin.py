"""The first launch of a decode step, under the Triton interpreter or on a GPU, against the torch code it stands for."""

from __future__ import annotations

from tests.kernels.interpreter import DEVICE  # isort: skip, first of all

import pytest
import torch

pytest.importorskip("triton")
from cuda_kernels.step_begin import begin_decode
from tests.kernels.compiled import compile_kernels

SLOTS, VOCAB, WIDTH = 6, 50, 48


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_ids_positions_turns_and_rows_are_those_of_torch() -> None:
    random = torch.Generator().manual_seed(1)
    table = torch.randn(VOCAB, WIDTH, generator=random).half().to(DEVICE)
    last = torch.tensor([9, 1, VOCAB, -5, 2, 0], device=DEVICE)  # two of them outside the vocabulary
    length = i32(3, 131071, 7, 9, 11, 0)
    ropes = [(torch.rand(half, generator=random).to(DEVICE), scale) for half, scale in ((12, 1.0), (8, 1.25))]
    slots, token_ids, computed = i32(0, 1, 2, 3, 4, 5), i32(-1, 49, -1, -1, 50, -2), i32(-1, -1, 5, -1, -1, 0)
    start = begin_decode(slots, token_ids, computed, last, length, ropes, table, 3.3)
    assert start.ids.tolist() == [9, 49, 49, 0, 49, 0]
    assert start.bad.tolist() == [0, 0, 1, 1, 1, 1]
    assert start.positions.tolist() == [3, 131071, 5, 9, 11, 0]
    assert start.lengths.tolist() == [4, 131072, 6, 10, 12, 1]
    assert torch.equal(start.x, table[start.ids.long()] * float(torch.tensor(3.3, dtype=torch.float16)))
    for (inv_freq, scale), (cos, sin) in zip(ropes, start.turns, strict=True):
        angles = start.positions.float()[:, None] * inv_freq
        torch.testing.assert_close(cos, torch.cos(angles) * scale, rtol=0, atol=3e-7)
        torch.testing.assert_close(sin, torch.sin(angles) * scale, rtol=0, atol=3e-7)


def test_no_rope_no_scale_and_a_given_flag_buffer() -> None:
    table, bad = torch.randn(VOCAB, 33, device=DEVICE), i32(7, 7)
    last = torch.arange(SLOTS, device=DEVICE)
    start = begin_decode(i32(0, 5), i32(3, -1), i32(0, -1), last, i32(*range(SLOTS)), [], table, bad=bad)
    assert start.turns == () and bad.tolist() == [0, 0]
    assert torch.equal(start.x, table[[3, 5]]) and start.lengths.tolist() == [1, 6]


def test_page_tables_take_the_steps_changes() -> None:
    first, second = i32(*[0] * 3 * SLOTS).view(SLOTS, 3), i32(*[9] * 2 * SLOTS).view(SLOTS, 2)
    none, slots, table = i32(0, 0), torch.zeros(SLOTS, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    deltas = [(i32(1, SLOTS - 1), i32(2, 0), i32(77, 0), first), (i32(SLOTS - 1, 0), i32(1, 1), i32(0, 5), second)]
    begin_decode(none, none, none, slots, slots, [], table, deltas=deltas)
    expected = torch.zeros_like(first)
    expected[1, 2] = 77
    assert torch.equal(first, expected)
    assert second.tolist() == [[9, 5], *[[9, 9]] * (SLOTS - 2), [9, 0]]


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="token_ids"):
        begin_decode(i32(0, 1), i32(0), i32(0, 0), torch.zeros(2), torch.zeros(2), [], torch.zeros(4, 4))
    with pytest.raises(ValueError, match="contiguous"):
        begin_decode(i32(0), i32(0), i32(0), torch.zeros(2), torch.zeros(2), [], torch.zeros(4, 8)[:, ::2])


def test_it_compiles_for_both_architectures() -> None:
    types = {
        "slots": "*i32", "token_ids": "*i32", "computed": "*i32", "last_token": "*i64", "length": "*i32",
        "numbers": "*i32", "bad": "*i32", "embed": "*bf16", "x": "*bf16", "vocab": "i32", "scale": "fp32",
        "inv_freqs": ("*fp32", "*fp32"), "turn_scales": ("fp32", "fp32"), "cosines": ("*fp32", "*fp32"),
        "sines": ("*fp32", "*fp32"), "delta_slots": ("*i32",), "delta_columns": ("*i32",), "delta_pages": ("*i32",),
        "tables": ("*i32",),
    }  # fmt: skip
    constants = {"PAGES": (128,), "HALVES": (64, 48), "WIDTH": 4096, "BLOCK": 4096, "SCALED": True}
    kernel = ("cuda_kernels.step_begin", "begin_kernel", types, constants)
    for made in compile_kernels([(*kernel, arch, {"num_warps": 8}) for arch in (80, 90)]):
        assert "cos.approx" not in made["ptx"] and "sin.approx" not in made["ptx"]  # positions reach 131072
