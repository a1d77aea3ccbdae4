"""Times of the elementwise and sampling kernels on a GPU: bytes a second against a copy of the same run.

A part of bench/kernels.py; alone: python -m bench.kernels_sampling. Each case is captured once in a graph that launches
it over several inputs, together larger than the L2 cache, and the median of its replays is reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from cuda_kernels import fused, sampler, sampling, score, step_begin

VOCAB = 128256
INPUT_BYTES = 160 << 20  # several times the L2 cache
MOST_INPUTS = 48


def microseconds(run: Callable[[int], object], inputs: int, replays: int = 9) -> float:
    """Median time of run(i) over i < inputs, launched from a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(inputs):
            run(i)
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / inputs)
    return median(times[1:])


def num_inputs(size_bytes: int) -> int:
    return min(max(INPUT_BYTES // size_bytes, 2), MOST_INPUTS)


def copy_rate() -> float:
    """Bytes a second of a device copy, read and written."""
    source = [torch.randn(256 << 18, device="cuda") for _ in range(2)]
    targets = [torch.empty_like(part) for part in source]
    took = microseconds(lambda i: targets[i].copy_(source[i]), 2)
    return 2 * source[0].nbytes / took * 1e6


def report(name: str, took: float, size_bytes: int, rate: float) -> None:
    share = size_bytes / took * 1e6 / rate
    print(f"{name:<44} {took:9.2f} us {size_bytes / took / 1e3:8.0f} GB/s {100 * share:5.1f}% of a copy", flush=True)


def bench_argmax(rate: float, rows: Iterable[int], tiles: Iterable[int] = (sampling.TILE,)) -> None:
    for count in rows:
        size = count * VOCAB * 4
        inputs = [torch.randn(count, VOCAB, device="cuda") for _ in range(num_inputs(size))]
        for tile in tiles:
            took = microseconds(lambda i, inputs=inputs, tile=tile: sampling.scan(inputs[i], tile), len(inputs))
            report(f"scan {count} x {VOCAB}, tile {tile}", took, size, rate)
        took = microseconds(lambda i, inputs=inputs: sampling.argmax(inputs[i]), len(inputs))
        report(f"argmax {count} x {VOCAB}", took, size, rate)
        took = microseconds(lambda i, inputs=inputs: inputs[i].argmax(dim=1), len(inputs))
        report(f"torch argmax {count} x {VOCAB}", took, size, rate)


def bench_fused(rate: float, rows: Iterable[int]) -> None:
    weight = torch.randn(4096, device="cuda")
    for count in rows:
        rows_of = [torch.randn(count, 4096, device="cuda").bfloat16() for _ in range(num_inputs(count * 4096 * 4))]
        took = microseconds(lambda i, r=rows_of: fused.rms_norm(r[i], weight, 1e-5, 0.0), len(rows_of))
        report(f"rms_norm {count} x 4096", took, count * 4096 * 4, rate)
        wide = [torch.randn(count, 28672, device="cuda").bfloat16() for _ in range(num_inputs(count * 28672 * 2))]
        took = microseconds(lambda i, w=wide: fused.gated(w[i], "silu"), len(wide))
        report(f"gated {count} x 28672", took, count * 14336 * 6, rate)


def bench_step(rate: float, rows: Iterable[int]) -> None:
    embed = torch.randn(VOCAB, 4096, device="cuda").bfloat16()
    ropes = [(torch.rand(64, device="cuda"), 1.0)]
    last, length = torch.randint(0, VOCAB, (513,), device="cuda"), torch.randint(0, 9000, (513,), device="cuda")
    table = torch.zeros(513, 128, dtype=torch.int32, device="cuda")
    outputs = torch.zeros_like(last)
    for count in rows:
        slots = torch.arange(count, device="cuda", dtype=torch.int32)
        none, zero = torch.full_like(slots, -1), torch.zeros_like(slots)
        deltas = [(zero + 512, zero, zero, table)]

        def begin(i: int, slots: Tensor = slots, none: Tensor = none, deltas: step_begin.Deltas = deltas) -> object:
            return step_begin.begin_decode(slots, none, none, last, length, ropes, embed, 1.0, deltas)

        report(f"begin_decode {count} x 4096", microseconds(begin, 20), count * 4096 * 4, rate)
        found = sampling.scan(torch.randn(count, VOCAB, device="cuda"))
        packed = torch.zeros(3 * count, dtype=torch.int32, device="cuda")

        def end(i: int, found: sampling.Scan = found, slots: Tensor = slots, packed: Tensor = packed) -> None:
            sampling.end_decode(found, slots, last, outputs, packed, slots)

        report(f"end_decode {count}", microseconds(end, 20), found.keys.nbytes, rate)


CASES = {  # temperature, min_p, top_k, top_p
    "greedy": (0.0, 0.0, 0, 1.0),
    "temperature": (0.8, 0.0, 0, 1.0),
    "top-k 50": (0.8, 0.0, 50, 1.0),
    "top-k 50, top-p 0.9": (0.8, 0.0, 50, 0.9),
    "top-p 0.9": (0.8, 0.0, 0, 0.9),
    "min-p 0.05": (0.8, 0.05, 0, 1.0),
    "top-k 1000": (0.8, 0.0, 1000, 1.0),
}


def table_of(count: int, row: tuple[float, float, int, float]) -> list[Tensor]:
    """temperature, min_p, top_k, top_p, seed and num_outputs of `count` slots, on the GPU."""
    numbers = [torch.full((count,), value, device="cuda") for value in row]
    return [*numbers, torch.randint(0, 2**32, (count, 2), device="cuda"), torch.arange(count, device="cuda")]


def likely(rows: int, peaked: bool) -> Tensor:
    """Logits f32 [rows, V]: as a model's are, or as noise."""
    if not peaked:
        return torch.randn(rows, VOCAB, device="cuda")
    return torch.rand(rows, VOCAB, device="cuda").mul_(VOCAB).add_(1).log_().mul_(-2.5)


def draw_one(inputs: list[Tensor], table: tuple[Tensor, ...], i: int) -> object:
    return sampler.sample(inputs[i], *table)


def bench_sample(rate: float, rows: Iterable[int], names: Iterable[str] = tuple(CASES)) -> None:
    for count in rows:
        size = count * VOCAB * 4
        slots = torch.arange(count, device="cuda", dtype=torch.int32)
        for peaked in (True, False):
            inputs = [likely(count, peaked) for _ in range(num_inputs(size))]
            shape = "peaked" if peaked else "flat"
            for name in names:
                table = table_of(count, CASES[name])
                run = partial(draw_one, inputs, (slots, *table))
                took = microseconds(run, len(inputs))
                report(f"sample {count} {shape}, {name}", took, size, rate)
            took = microseconds(lambda i, x=inputs, slots=slots: score.score(x[i], slots, 20), len(inputs))
            report(f"score {count} {shape}, top 20", took, size, rate)


def main(arguments: list[str], bandwidth: float) -> int:
    """bandwidth: bytes a second of a device copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64, 256])
    rows = parser.parse_args(arguments).rows
    bench_argmax(bandwidth, rows)
    bench_sample(bandwidth, rows)
    bench_step(bandwidth, rows)
    bench_fused(bandwidth, (*rows, 8192))
    return 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("kernels_sampling: needs a GPU")
    sys.exit(main(sys.argv[1:], copy_rate()))
