"""How a decode step grows with context and with batch on one GPU, against floors of the same run, as figures and plots.

    python bench/scaling.py [--contexts 1024,...,131072] [--batches 1,...,256] [--plots docs/plots]

An 8B Llama shape in bf16 with dummy weights, the torch runner alone (hand-made plans, rows opened as if their context
had been computed: the pages hold zeros, which costs what anything else costs). Context: batch 1; the added time of a
token against KV bytes over the copy bandwidth. Batch: at a context of 512; the step against products alone (cuBLAS,
captured, the model's own weights) plus KV bytes over bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.ceilings import copy_bandwidth, gpu_seconds
from bench.gpu import LLAMA_8B
from bench.plans import Driver
from bench.plot import Line, plot
from bench.table_h200 import Shape

CONTEXTS = "1024,2048,4096,8192,16384,32768,65536,131008"
BATCHES = "1,2,4,8,9,16,17,24,32,33,48,64,65,96,128,129,160,192,193,224,256"
BATCH_CONTEXT = 512
STEPS = 24


def step_ms(driver: Driver, batch: int, context: int) -> float:
    """Median of a decode step, its first few left out."""
    rows = driver.open(batch, context + STEPS + 2, context)
    driver.run(driver.plan(rows, np.full(batch, 7, np.int32), True, True))
    return float(np.median(np.diff(driver.steps(rows, STEPS))[4:])) * 1e3


def products_ms(driver: Driver, batch: int) -> float:
    """All products of a step by cuBLAS in one captured graph."""
    import torch
    from torch.nn.functional import linear

    decoder = driver.runner._decoder
    weights = [
        w for layer in decoder.layers for w in (layer.mixer.qkv, layer.mixer.o, layer.ffn.gate_up, layer.ffn.down)
    ]
    weights.append(decoder.head)
    inputs = {w.shape[1]: torch.randn(batch, w.shape[1], device="cuda", dtype=w.dtype) for w in weights}

    def run() -> None:
        for w in weights:
            linear(inputs[w.shape[1]], w)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return gpu_seconds(graph.replay) * 1e3


def contexts(driver: Driver, sizes: list[int], kv_ms: float) -> list[Line]:
    """kv_ms: of the keys and values of one token, over bandwidth."""
    times = [step_ms(driver, 1, size) for size in sizes]
    for (before, last), (size, ms) in pairwise(zip(sizes, times, strict=True)):
        added = (ms - last) / (size - before)
        print(f"context {size:7d}: {ms:7.3f} ms; a token adds {added * 1e6:6.1f} ns, {added / kv_ms:5.2f} x its bytes")
    whole = (times[-1] - times[0]) / (sizes[-1] - sizes[0]) / kv_ms
    print(f"from {sizes[0]} to {sizes[-1]}: {whole:.2f} x KV bytes over bandwidth (wanted 1.25)", flush=True)
    floor = [times[0] + (size - sizes[0]) * kv_ms for size in sizes]
    return [Line("step", sizes, times), Line("first + KV bytes / bandwidth", sizes, floor)]


def batches(driver: Driver, sizes: list[int], kv_ms: float) -> list[Line]:
    times, floors = [], []
    for size in sizes:
        times.append(step_ms(driver, size, BATCH_CONTEXT))
        floors.append(products_ms(driver, size) + size * (BATCH_CONTEXT + STEPS / 2) * kv_ms)
        jump = times[-1] / times[-2] if len(times) > 1 else 1.0
        print(
            f"batch {size:4d}: {times[-1]:7.3f} ms, {times[-1] / floors[-1]:5.2f} x products + KV bytes "
            f"({floors[-1]:.3f} ms); {jump:5.2f} x the one before",
            flush=True,
        )
    worst = max(t / f for t, f in zip(times, floors, strict=True))
    edges = [b / a for i, (a, b) in enumerate(pairwise(times)) if sizes[i + 1] == sizes[i] + 1]
    print(
        f"worst {worst:.2f} x (wanted 1.25); largest jump at an edge {max(edges, default=1):.2f} (wanted 1.15)",
        flush=True,
    )
    return [Line("step", sizes, times), Line("products alone + KV bytes / bandwidth", sizes, floors)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default=CONTEXTS)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--plots", type=Path, help="folder for scaling_context.svg and scaling_batch.svg")
    args = parser.parse_args()
    from engine.config import CacheConfig, ModelConfig, ScheduleConfig

    sizes, counts = ([int(n) for n in text.split(",")] for text in (args.contexts, args.batches))
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        driver = Driver(
            "torch", Path(folder), ModelConfig(dtype="bfloat16", load_format="dummy", max_model_len=131072),
            CacheConfig(kv_cache_memory_bytes=40 << 30),
            ScheduleConfig(max_num_seqs=max(counts), max_num_batched_tokens=2048),
        )  # fmt: skip
    kv_ms = Shape(LLAMA_8B).kv_bytes / bandwidth * 1e3
    grown = {"batch": batches(driver, counts, kv_ms), "context": contexts(driver, sizes, kv_ms)}
    if args.plots is not None:
        args.plots.mkdir(parents=True, exist_ok=True)
        for name, lines in grown.items():
            title = f"8B decode step against {name}, one GPU (ms)"
            (args.plots / f"scaling_{name}.svg").write_text(plot(title, name, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
