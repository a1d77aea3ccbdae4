"""Log-probabilities, ranks and the likeliest ids under the Triton interpreter, against backends/torch/sample.score."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported first
pytest.importorskip("triton")

from backends.torch import sample as plain
from cuda_kernels import score
from tests.kernels.compiled import compile_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(logits: torch.Tensor, targets: torch.Tensor, num_top: int) -> None:
    chosen, rank, ids, top = score.score(logits, targets, num_top)
    wide = logits.float()
    expected = plain.score(wide, targets, num_top)
    torch.testing.assert_close(chosen, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(rank, expected[1])
    torch.testing.assert_close(top, expected[3], rtol=1e-5, atol=1e-5)
    ordered = wide.sort(dim=1, descending=True, stable=True).indices[:, :num_top]  # equals: the smaller id first
    assert torch.equal(ids, ordered.int())


@pytest.mark.parametrize("vocab", [30, 5000, 8192])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_against_torch(vocab: int, num_top: int) -> None:
    random = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(4, vocab, generator=random) * 4).to(DEVICE)
    targets = torch.randint(0, vocab, (4,), generator=random).to(DEVICE)
    targets[1] = logits[1].argmax()
    check(logits, targets, num_top)
    check(logits.bfloat16(), targets, num_top)


def test_equals_and_rows_with_little_left() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)  # more equals than the kernel gathers
    logits[1] = -torch.inf
    logits[1, [4000, 17, 3]] = torch.tensor([1.0, 2.0, 1.0], device=DEVICE)
    logits[2, 100:140] = 3.0
    check(logits, torch.tensor([4999, 3, 120], device=DEVICE), 5)


def test_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="num_top 65"):
        score.score(torch.zeros(1, 100), torch.zeros(1, dtype=torch.int64), 65)
    with pytest.raises(ValueError, match="num_top 9"):
        score.score(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), 9)


def test_they_compile_for_both_architectures() -> None:
    types = {"logits": "*fp32", "targets": "*i64", "floats": "*fp32", "integers": "*i32", "stride": "i32"}
    sizes = {"vocab": 128256, "TILES": 32, "SUBS": 2048, "ROOM": score.ROOM}
    review = ("cuda_kernels.score", "review_kernel", types, sizes | {"TILE": score.TILE})
    types = types | {"chosen": "*fp32", "rank": "*i32", "top_ids": "*i32", "tops": "*fp32", "num_top": "i32"}
    sizes = sizes | {"TILE_BLOCK": 32, "SUB_BLOCK": 2048, "PIECE": score.TILE}
    rank = ("cuda_kernels.score", "rank_kernel", types, sizes)
    for made in compile_kernels([(*kernel, arch, {"num_warps": 4}) for kernel in (review, rank) for arch in (80, 90)]):
        assert made["shared"] < 48 << 10
