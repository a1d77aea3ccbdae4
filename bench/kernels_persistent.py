"""A decode step of the 0.6B shape on a GPU, in one launch and in five a layer: are they equal, how long do they take?

    python -m bench.kernels persistent [--rows 1 2 4 8] [--context 200] [--layers 28]

Both run as captured graphs over random weights, several times the L2 cache. Differences of logits stand beside those
of the same step in float32 (plain torch, f32 sums throughout): the one launch should not lie further from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cuda_kernels import attention_decode, small_linear
from cuda_kernels.attention_items import make_items
from cuda_kernels.cuda_module import runs_on
from cuda_kernels.gpu_attention import GpuWork, HeadSpec, attend
from cuda_kernels.persistent import LayerTensors, PersistentDecode, Shape

EPS, PAGE = 1e-6, 64
SMALL = {"width": 1024, "heads": 16, "kv_heads": 8, "head_size": 128, "ffn": 3072, "vocab": 151936, "qk_norm": True,
         "page": PAGE}  # fmt: skip


@dataclass
class Case:
    """A model of random weights and one decode step of it."""

    shape: Shape
    lengths: list[int]
    device: str = "cuda"
    layers: list[LayerTensors] = field(default_factory=list)

    def __post_init__(self) -> None:
        s, rows = self.shape, len(self.lengths)
        torch.manual_seed(1)
        pages = [-(-length // PAGE) for length in self.lengths]
        self.cache = self.normal(s.layers, 2, sum(pages) + 1, s.kv_heads, PAGE, s.head_size, scale=1.0)
        self.page_table = torch.zeros(rows + 1, max(pages), dtype=torch.int32, device=self.device)
        numbers = iter((torch.randperm(sum(pages)) + 1).tolist())
        for row, count in enumerate(pages):
            self.page_table[row, :count] = torch.tensor([next(numbers) for _ in range(count)])
        self.slots = torch.randperm(rows, device=self.device).int()
        ordered = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        self.row_lengths = ordered[self.slots.long()].contiguous()
        angles = torch.rand(rows, s.head_size // 2, device=self.device) * 6
        self.cos, self.sin = torch.cos(angles), torch.sin(angles)
        self.x = self.normal(rows, s.width, scale=1.0)
        self.final_norm, self.head = self.gain(s.width), self.normal(s.vocab, s.width)
        for index in range(s.layers):
            self.layers.append(
                LayerTensors(
                    attn_norm=self.gain(s.width), q_norm=self.gain(s.head_size), k_norm=self.gain(s.head_size),
                    ffn_norm=self.gain(s.width), qkv=self.normal((s.heads + 2 * s.kv_heads) * s.head_size, s.width),
                    o=self.normal(s.width, s.heads * s.head_size), gate_up=self.normal(2 * s.ffn, s.width),
                    down=self.normal(s.width, s.ffn), keys=self.cache[index, 0], values=self.cache[index, 1],
                )
            )  # fmt: skip

    def normal(self, *shape: int, scale: float | None = None) -> Tensor:
        deviation = shape[-1] ** -0.5 if scale is None else scale
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, deviation)

    def gain(self, size: int) -> Tensor:
        return torch.rand(size, device=self.device) + 0.5

    @property
    def scale(self) -> float:
        return float(self.shape.head_size**-0.5)


def five_launches(case: Case, workspace: attention_decode.Workspace) -> Tensor:
    """Logits by the launches of torch_models/fused.py."""
    x, s = case.x.clone(), case.shape
    items = make_items(case.cache, case.page_table, case.slots, case.row_lengths, workspace.num_sms)
    work = GpuWork(
        page_table=case.page_table, slots=case.slots, lengths=case.row_lengths, workspace=workspace, items=items
    )
    for index, layer in enumerate(case.layers):
        spec = HeadSpec(num_heads=s.heads, scale=case.scale, q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=EPS)
        qkv = small_linear.norm_linear(x, layer.attn_norm, EPS, 0.0, layer.qkv)
        mixed = attend(qkv, (case.cos, case.sin), case.cache, index, work, spec)
        x = small_linear.linear_add(mixed, layer.o, None, x)
        gated = small_linear.norm_gated(x, layer.ffn_norm, EPS, 0.0, layer.gate_up)
        x = small_linear.linear_add(gated, layer.down, None, x)
    return small_linear.head(x, case.final_norm, EPS, 0.0, case.head)


def exact(case: Case) -> Tensor:
    """Logits in float32, from the same weights and old keys; plain torch."""
    x, s = case.x.float(), case.shape
    group = s.heads // s.kv_heads

    def norm(values: Tensor, gain: Tensor) -> Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS) * gain

    def turn(heads: Tensor) -> Tensor:  # [T, n, H]
        first, second = heads.chunk(2, -1)
        cos, sin = case.cos[:, None], case.sin[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    for index, layer in enumerate(case.layers):
        qkv = norm(x, layer.attn_norm) @ layer.qkv.float().t()
        q, k, v = qkv.view(len(x), -1, s.head_size).split([s.heads, s.kv_heads, s.kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k, out = turn(q), turn(k), []
        for row, (slot, length) in enumerate(zip(case.slots.tolist(), case.row_lengths.tolist(), strict=True)):
            pages = case.page_table[slot, : -(-length // PAGE)].long()
            held = case.cache[index][:, pages].float().permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, : length - 1]
            keys, values = torch.cat([held, torch.stack([k[row], v[row]])[:, :, None]], 2).repeat_interleave(group, 1)
            weights = torch.softmax(torch.einsum("nh,nch->nc", q[row], keys) * case.scale, -1)
            out.append(torch.einsum("nc,nch->nh", weights, values).flatten())
        x = x + torch.stack(out) @ layer.o.float().t()
        gate, up = (norm(x, layer.ffn_norm) @ layer.gate_up.float().t()).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer.down.float().t()
    return norm(x, case.final_norm) @ case.head.float().t()


def captured(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, repeats: int = 30) -> float:
    """Median time of a replay."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 2)
    return sorted(times)[repeats // 2]


def decoder_of(case: Case) -> PersistentDecode:
    norms = (EPS, 0.0, EPS, 0.0)
    return PersistentDecode(
        case.shape, case.layers, case.final_norm, case.head, norms=norms, scale=case.scale, rows=len(case.lengths)
    )


def measure(case: Case, decoder: PersistentDecode) -> str:
    rows = len(case.lengths)
    device = torch.device(case.device)
    workspace = attention_decode.make_workspace(rows, case.shape.heads, case.shape.head_size, device)
    logits = torch.empty(rows, case.shape.vocab, device=case.device)
    x, turn = torch.empty_like(case.x), (case.cos, case.sin)

    def one() -> None:
        x.copy_(case.x)
        decoder.run(x, turn, case.page_table, case.slots, case.row_lengths, logits)

    wanted, reference = exact(case), five_launches(case, workspace)
    written = case.cache.clone()
    one()
    cache_differs = (case.cache.float() - written.float()).abs().max().item()
    ours, theirs = ((found - wanted).abs() for found in (logits, reference))
    single, five = captured(one), captured(lambda: five_launches(case, workspace))
    return (
        f"{rows:3d} rows of {min(case.lengths)}-{max(case.lengths)}: one launch {milliseconds(single):.4f} ms, "
        f"five a layer {milliseconds(five):.4f}; |difference from float32| {ours.mean():.5f} (most {ours.max():.4f}), "
        f"five {theirs.mean():.5f} (most {theirs.max():.4f}), caches {cache_differs:.4f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not runs_on(torch.device("cuda")):
        sys.exit("the kernel needs a GPU of compute capability 9.0 and NVRTC")
    shape = Shape(layers=args.layers, **SMALL)
    with torch.inference_mode():
        for rows in args.rows:
            case = Case(shape, [args.context + 7 * row for row in range(rows)])
            print(measure(case, decoder_of(case)), flush=True)


if __name__ == "__main__":
    main()
