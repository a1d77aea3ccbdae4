"""Bench lines of the attention kernels on a GPU: microseconds a launch beside what the bytes or flops allow.

Every launch of a measurement reads other pages, several times the L2 cache in all, inside one CUDA graph; the roofline
is the copy bandwidth of the same run. `python bench/kernels_attention.py [decode] [prefill]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch

from cuda_kernels.attention_decode import decode_attention, make_workspace
from cuda_kernels.attention_items import make_items
from cuda_kernels.attention_ragged import make_work, query_tile, ragged_attention
from cuda_kernels.rope_cache import rope_and_write

DEVICE = torch.device("cuda")
PAGE = 64


def replay_us(launches: list[Callable[[], object]], repeats: int = 5) -> float:
    """Fastest of `repeats` graph replays, microseconds a launch."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    best = float("inf")
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best * 1e3 / len(launches)


def copy_bandwidth() -> float:
    """Bytes a second of a device copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (replay_us([lambda: target.copy_(source)] * 4) * 1e-6)


def paged(rows: list[int], heads: int, kv_heads: int, head_size: int, layers: int, dtype: torch.dtype) -> dict:
    """Cache, tables and one token a row, keys `rows`; pages of a row are scattered."""
    columns = -(-max(rows) // PAGE)
    counts = [-(-n // PAGE) for n in rows]
    order = torch.randperm(sum(counts)).int() + 1
    table = torch.zeros(len(rows) + 1, columns, dtype=torch.int32)
    at = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[at : at + count]
        at += count
    cache = torch.zeros(layers, 2, at + 1, kv_heads, PAGE, head_size, device=DEVICE, dtype=dtype)
    cache.view(torch.int16 if dtype != torch.float8_e4m3fn else torch.int8).random_(0, 100)
    return {
        "cache": cache,
        "page_table": table.to(DEVICE),
        "slots": torch.arange(len(rows), dtype=torch.int32, device=DEVICE),
        "lengths": torch.tensor(rows, dtype=torch.int32, device=DEVICE),
    }


def decode_line(
    name: str, rows: list[int], peak: float, heads: int = 32, kv_heads: int = 8, size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> float:  # fmt: skip
    """Microseconds. Pages of `dtype`; a row of the batch sees as many keys as `rows` says."""
    key_bytes = 2 * kv_heads * size * dtype.itemsize * sum(rows)
    layers = max(2, min(64, int(2.5e9 / key_bytes)))
    step = paged(rows, heads, kv_heads, size, layers, dtype)
    count = len(rows)
    qkv = torch.randn(count, (heads + 2 * kv_heads) * size, device=DEVICE, dtype=torch.bfloat16)
    cos, sin = torch.rand(2, count, size // 2, device=DEVICE).unbind()
    workspace = make_workspace(count, heads, size, DEVICE)
    items = make_items(step["cache"], step["page_table"], step["slots"], step["lengths"], workspace.num_sms)

    def launch(layer: int) -> Callable[[], object]:
        return lambda: decode_attention(
            qkv, step["cache"], layer, step["page_table"], items, cos, sin,
            num_heads=heads, scale=size**-0.5, workspace=workspace, dependent=True,
        )  # fmt: skip

    took = replay_us([launch(i % layers) for i in range(max(8, layers))])
    rate = key_bytes / took * 1e6
    print(f"decode {name:24} {took:8.1f} us  {rate / 1e9:6.0f} GB/s {100 * rate / peak:4.0f} %", flush=True)
    return took


def context_lines(peak: float, heads: int = 32, kv_heads: int = 8, size: int = 128) -> None:
    """One row from 1k to 128k keys, and the time that keys beyond 1k add over the time of their bytes."""
    contexts = [1024 * 2**i for i in range(8)]
    took = [decode_line(f"1 x {n}", [n], peak, heads, kv_heads, size) for n in contexts]
    for n, us in zip(contexts[1:], took[1:], strict=True):
        bytes_us = 4 * kv_heads * size * (n - contexts[0]) / peak * 1e6
        print(f"added by {n} keys: {us - took[0]:6.1f} us, {(us - took[0]) / bytes_us:.2f} x their bytes", flush=True)


def prefill_line(name: str, new: list[int], before: list[int], heads: int = 32, kv_heads: int = 8, size: int = 128):
    rows = [n + b for n, b in zip(new, before, strict=True)]
    step = paged(rows, heads, kv_heads, size, 2, torch.bfloat16)
    tokens = sum(new)
    q = torch.randn(tokens, heads, size, device=DEVICE, dtype=torch.bfloat16)
    step["cache"].copy_(torch.randn_like(step["cache"]))
    starts = torch.tensor(np.cumsum([0, *new]), dtype=torch.int32, device=DEVICE)
    work = make_work(np.array(new), np.array(before), query_tile(heads, kv_heads), DEVICE)

    def launch(layer: int) -> Callable[[], object]:
        return lambda: ragged_attention(
            q, step["cache"], layer, step["page_table"], step["slots"], starts, step["lengths"], work=work,
            scale=size**-0.5,
        )  # fmt: skip

    took = replay_us([launch(i % 2) for i in range(4)])
    pairs = sum(n * b + n * (n + 1) / 2 for n, b in zip(new, before, strict=True))
    print(f"ragged {name:24} {took:8.1f} us  {4 * pairs * heads * size / took / 1e6:6.0f} TFLOP/s", flush=True)


def rope_line(tokens: int, peak: float, heads: int = 32, kv_heads: int = 8, size: int = 128) -> None:
    step = paged([tokens], heads, kv_heads, size, 4, torch.bfloat16)
    width = (heads + 2 * kv_heads) * size
    qkv = torch.randn(4, tokens, width, device=DEVICE, dtype=torch.bfloat16)
    cos, sin = torch.rand(2, tokens, size // 2, device=DEVICE).unbind()
    at = torch.arange(tokens, device=DEVICE)
    write_at = step["page_table"][0, at // PAGE].long() * PAGE + at % PAGE

    def launch(layer: int) -> Callable[[], object]:
        return lambda: rope_and_write(qkv[layer], step["cache"], layer, write_at, cos, sin, num_heads=heads)

    took = replay_us([launch(i % 4) for i in range(8)])
    rate = 2 * tokens * width * 2 / took * 1e6
    print(f"rope_and_write {tokens:6} tokens {took:8.1f} us  {rate / 1e9:6.0f} GB/s {100 * rate / peak:4.0f} %",
          flush=True)  # fmt: skip


def main(wanted: list[str]) -> None:
    peak = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies {peak / 1e9:.0f} GB/s", flush=True)
    if not wanted or "decode" in wanted:
        decode_line("1 x 200", [200], peak)
        context_lines(peak)
        decode_line("64 x 2048", [2048] * 64, peak)
        decode_line("256 x 150", [150] * 256, peak)
        decode_line("256 x 256", [256] * 256, peak)
        decode_line("256 x 200..300 + 16k", [200 + i % 100 for i in range(255)] + [16384], peak)
        decode_line("64 x 2048, e4m3", [2048] * 64, peak, dtype=torch.float8_e4m3fn)
        decode_line("256 x 256, e4m3", [256] * 256, peak, dtype=torch.float8_e4m3fn)
        decode_line("16 x 1024", [1024] * 16, peak)
        decode_line("1 x 200, 16 / 8 heads", [200], peak, heads=16)
    if not wanted or "prefill" in wanted:
        prefill_line("1 x 8192", [8192], [0])
        prefill_line("8 x 1024", [1024] * 8, [0] * 8)
        prefill_line("512 after 4096, 64 singles", [512] + [1] * 64, [4096] + [1024] * 64)
        rope_line(8192, peak)
        rope_line(256, peak)


if __name__ == "__main__":
    main(sys.argv[1:])
