"""Linear layers whose result of a row depends on nothing but that row: for --batch-invariant.

The functions of small_linear.py, by one kernel for any number of rows. The order of a row's sums is fixed by the
weight's shape alone: the inner axis is cut into as many pieces as `pieces_of` says, each summed from its beginning by
tensor-core products of 16 values at a time, the pieces' sums added in their order. Few rows give each piece a program
of its own, which the last one to finish adds up; many rows let one program walk all pieces. Block sizes differ with the
number of rows where tensor cores do the sums: what one of them adds to an element does not depend on how many elements
are made beside it (tests/kernels/test_invariant.py asks the device). Needs triton.
Letters: T rows · I in · O out · F = O / 2 of a gated product · V vocabulary.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_kernels.fused import launch_options, rms_norm
from cuda_kernels.small_linear_kernels import ACTIVATIONS, activate, arrive

COUNTERS = 1 << 14  # tiles whose pieces are programs of their own
SPREAD = 8192  # weights with fewer rows are cut along the inner axis, so that few rows of x fill the device too
GROUP = 8  # blocks of rows that run side by side, to share the weights they read


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a launch is cut up; no choice here changes a result."""

    out: int  # rows of the weight
    rows: int  # rows of x
    inner: int = 64
    warps: int = 4
    stages: int = 4
    apart: bool = False  # each piece of the inner axis is a program


FEW = Tile(out=64, rows=16, inner=128, apart=True)
SOME = Tile(out=64, rows=64, inner=128, stages=3, apart=True)
MANY = Tile(out=128, rows=128, warps=8)
MANY_GATED = Tile(out=64, rows=128, stages=3)  # 621 TFLOP/s at 8192 rows of an 8B model on an H200, MANY 559
INTERPRETED = Tile(out=64, rows=16, inner=64, apart=True)  # numpy sums in another order in another shape
SIMPLE = Tile(out=32, rows=32, inner=32, apart=True)  # float32: no tensor cores, so one shape


def pieces_of(num_out: int, inner: int) -> int:
    """Pieces of the inner axis of a weight, by its shape alone."""
    return 4 if num_out < SPREAD and inner >= 1024 else 1


def tile_of(rows: int, gated: bool, x: Tensor) -> Tile:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETED
    if x.dtype == torch.float32:
        return SIMPLE
    if rows <= FEW.rows:
        return FEW
    if rows <= 2 * SOME.rows:
        return SOME
    return MANY_GATED if gated else MANY


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. x: [T, I]; weight: [O, I]; bias: [O] -> [T, O]."""
    return product(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x @ weight.T + bias. x: [T, I]; weight: [O, I]; bias: [O]; residual: [T, O] -> [T, O]."""
    return product(x, weight, bias, residual=residual)


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, offset: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """rms_norm(x) @ weight.T + bias. x: [T, I]; norm_weight: f32 [I]; weight: [O, I]; bias: [O] -> [T, O]."""
    return product(rms_norm(x, norm_weight, eps, offset), weight, bias)


def norm_gated(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    offset: float,
    gate_up: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """act(gate) * up of rms_norm(x). x: [T, I]; norm_weight: f32 [I]; gate_up: [2F, I]; bias: [2F] -> [T, F]."""
    if activation not in ACTIVATIONS or not activation:
        raise ValueError(f"activation {activation!r}: not one of {[name for name in ACTIVATIONS if name]}")
    return product(rms_norm(x, norm_weight, eps, offset), gate_up, bias, activation=activation)


def head(
    x: Tensor, norm_weight: Tensor, eps: float, offset: float, weight: Tensor, out: Tensor | None = None
) -> Tensor:
    """Logits of rms_norm(x), f32 [T, V]. x: [T, I]; norm_weight: f32 [I]; weight: [V, I]; out: f32 [T, V] to write."""
    shape = (x.shape[0], weight.shape[0])
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not hold f32 logits {list(shape)}")
    return product(rms_norm(x, norm_weight, eps, offset), weight, None, out=out)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "",
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """x @ weight.T, with what else is given -> [T, O], or [T, F] with an activation. x: [T, I]; weight: [O, I]."""
    (rows, inner), gated = x.shape, bool(activation)
    num_out = weight.shape[0] // (1 + gated)
    check(x, weight, residual, num_out)
    x = x.contiguous()
    if out is None:
        out = torch.empty(rows, num_out, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    tile = tile or tile_of(rows, gated, x)
    pieces = pieces_of(weight.shape[0], inner)
    blocks = triton.cdiv(num_out, tile.out) * triton.cdiv(rows, tile.rows)
    apart = tile.apart and pieces > 1 and blocks <= COUNTERS
    partials = counters = out
    if apart:
        size = blocks * pieces * tile.out * tile.rows * (1 + gated)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = resting_counters(x.device)
    product_kernel[(blocks, pieces if apart else 1)](
        x, weight, x if bias is None else bias, x if residual is None else residual.contiguous(), out,
        partials, counters, rows, num_out,
        INNER=inner, PIECE=triton.cdiv(triton.cdiv(inner, pieces), 128) * 128, PIECES=pieces, APART=apart,
        BLOCK_OUT=tile.out, BLOCK_ROWS=tile.rows, BLOCK_IN=tile.inner, GROUP=GROUP, STAGES=tile.stages,
        KIND=ACTIVATIONS[activation], BIAS=bias is not None, RESIDUAL=residual is not None,
        enable_fp_fusion=False, **launch_options(x, tile.warps),
    )  # fmt: skip
    return out


def check(x: Tensor, weight: Tensor, residual: Tensor | None, num_out: int) -> None:
    """Raise ValueError unless the arguments of a product belong together."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype}")
    if residual is not None and residual.shape != (x.shape[0], num_out):
        raise ValueError(f"residual {tuple(residual.shape)}: [{x.shape[0]}, {num_out}] is wanted")


@functools.cache
def resting_counters(device: torch.device) -> Tensor:
    """i32 [COUNTERS], all zero between kernels: the last program of a tile clears its counter."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a product once before capturing it: its counters must not be of the graph")
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def sums_of(
    x,  # [T, I]
    weight,  # [O, I]
    row,  # [BLOCK_ROWS] in [0, T)
    at,  # [BLOCK_OUT] in [0, O), or in [0, F)
    up,  # elements from a gate's row to that of its up
    begin,
    INNER: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
):
    """The sums of one piece of the inner axis, f32 [BLOCK_OUT, BLOCK_ROWS], and those of up."""
    EVEN: tl.constexpr = INNER % PIECE == 0
    inputs = x + row[:, None].to(tl.int64) * INNER
    weights = weight + at[:, None].to(tl.int64) * INNER
    sums = tl.zeros((at.shape[0], row.shape[0]), tl.float32)
    ups = sums
    for k in tl.range(0, PIECE, BLOCK_IN, num_stages=STAGES):
        inner = begin + k + tl.arange(0, BLOCK_IN)
        if EVEN:
            a = tl.load(inputs + inner[None, :])
            w = tl.load(weights + inner[None, :])
        else:
            inside = (inner < INNER)[None, :]
            a = tl.load(inputs + inner[None, :], mask=inside, other=0.0)
            w = tl.load(weights + inner[None, :], mask=inside, other=0.0)
        sums = tl.dot(w, tl.trans(a), sums, input_precision="ieee")
        if GATED:
            if EVEN:
                v = tl.load(weights + up + inner[None, :])
            else:
                v = tl.load(weights + up + inner[None, :], mask=inside, other=0.0)
            ups = tl.dot(v, tl.trans(a), ups, input_precision="ieee")
    return sums, ups


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x,  # [T, I]
    weight,  # [O, I]
    bias,  # [O]
    residual,  # [T, O]
    out,  # [T, O], or [T, F] if gated
    partials,  # f32 [tiles, PIECES, 1 or 2, BLOCK_OUT, BLOCK_ROWS]
    counters,  # i32 [tiles], zeros before and after
    num_rows,
    num_out,
    INNER: tl.constexpr,
    PIECE: tl.constexpr,  # of the inner axis, a multiple of BLOCK_IN
    PIECES: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    GATED: tl.constexpr = KIND > 0
    BLOCK: tl.constexpr = BLOCK_OUT * BLOCK_ROWS
    SIZE: tl.constexpr = (1 + GATED) * BLOCK
    tile = tl.program_id(0)
    out_tiles, row_tiles = tl.cdiv(num_out, BLOCK_OUT), tl.cdiv(num_rows, BLOCK_ROWS)
    group = tile // (GROUP * out_tiles)
    members = tl.minimum(row_tiles - group * GROUP, GROUP)
    nth = tile % (GROUP * out_tiles)
    row = (group * GROUP + nth % members) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = nth // members * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    from_row, from_at = tl.minimum(row, num_rows - 1), tl.minimum(at, num_out - 1)
    up = num_out.to(tl.int64) * INNER
    arrive(DEPENDENT)
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    ups = total
    if APART:
        piece = tl.program_id(1)
        sums, more = sums_of(x, weight, from_row, from_at, up, piece * PIECE, INNER, PIECE, BLOCK_IN, STAGES, GATED)
        cells = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        place = partials + tile.to(tl.int64) * (PIECES * SIZE)
        tl.store(place + piece * SIZE + cells, sums)
        if GATED:
            tl.store(place + piece * SIZE + BLOCK + cells, more)
        tl.debug_barrier()  # all threads' stores come before the release below
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") < PIECES - 1:
            return
        tl.store(counters + tile, 0)
        for nth_piece in tl.static_range(PIECES):  # past the first cache, which may hold what was here before
            total += tl.load(place + nth_piece * SIZE + cells, cache_modifier=".cg")
            if GATED:
                ups += tl.load(place + nth_piece * SIZE + BLOCK + cells, cache_modifier=".cg")
    elif PIECES == 1:
        total, ups = sums_of(x, weight, from_row, from_at, up, 0, INNER, PIECE, BLOCK_IN, STAGES, GATED)
    else:
        for nth_piece in tl.range(0, PIECES):  # not unrolled: the compiler would take seconds for each
            sums, more = sums_of(
                x, weight, from_row, from_at, up, nth_piece * PIECE, INNER, PIECE, BLOCK_IN, STAGES, GATED
            )
            total += sums
            if GATED:
                ups += more
    if BIAS:
        total += tl.load(bias + from_at).to(tl.float32)[:, None]
        if GATED:
            ups += tl.load(bias + num_out + from_at).to(tl.float32)[:, None]
    if GATED:
        total = activate(total, KIND) * ups
    targets = row[None, :].to(tl.int64) * num_out + at[:, None]
    mask = (row < num_rows)[None, :] & (at < num_out)[:, None]
    if RESIDUAL:
        total += tl.load(residual + targets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + targets, total.to(out.dtype.element_ty), mask=mask)
