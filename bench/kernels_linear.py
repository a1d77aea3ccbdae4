"""Products of few rows on a GPU: each shape and plan by itself, and the chain of a whole model's products.

    python -m bench.kernels linear [--sweep] [--models 8b 0.6b 4b] [--rows 1 8 64]

A figure is the time of one launch within a captured graph whose launches read different weights, several times the L2
cache together; it stands beside the copy bandwidth of the same run. `--sweep` tries random plans of each shape within
the chain, keeps the best, and prints them for cuda_kernels/data/small_linear.json.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import queue
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cuda_kernels import small_linear
from cuda_kernels.small_linear_plan import LIBRARY, Plan, plan_of

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Product:
    """One of a layer's products. kind: norm, add, gated or head."""

    name: str
    kind: str
    num_out: int
    inner: int

    @property
    def weight_bytes(self) -> int:
        return 2 * self.num_out * self.inner


MODELS = {
    "8b": (32, (Product("qkv", "norm", 6144, 4096), Product("o", "add", 4096, 4096),
                Product("gate_up", "gated", 28672, 4096), Product("down", "add", 4096, 14336)),
           Product("head", "head", 128256, 4096)),
    "0.6b": (28, (Product("qkv", "norm", 4096, 1024), Product("o", "add", 1024, 2048),
                  Product("gate_up", "gated", 6144, 1024), Product("down", "add", 1024, 3072)),
             Product("head", "head", 151936, 1024)),
    "4b": (36, (Product("qkv", "norm", 6144, 2560), Product("o", "add", 2560, 4096),
                Product("gate_up", "gated", 19456, 2560), Product("down", "add", 2560, 9728)),
           Product("head", "head", 151936, 2560)),
}  # fmt: skip


def make_weight(product: Product) -> Tensor:
    weight = torch.empty(product.num_out, product.inner, device="cuda", dtype=torch.bfloat16)
    return weight.normal_(0, product.inner**-0.5)


def make_inputs(product: Product, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, I], norm weight [I], residual [T, O]."""
    x = torch.randn(rows, product.inner, device="cuda", dtype=torch.bfloat16)
    gain = torch.rand(product.inner, device="cuda") + 0.5
    return x, gain, torch.randn(rows, product.num_out, device="cuda", dtype=torch.bfloat16)


def call(product: Product, inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor, plan: Plan | None) -> Tensor:
    x, gain, residual = inputs
    if product.kind == "norm":
        return small_linear.norm_linear(x, gain, EPS, 0.0, weight, plan=plan)
    if product.kind == "add":
        return small_linear.linear_add(x, weight, None, residual, plan=plan)
    if product.kind == "gated":
        return small_linear.norm_gated(x, gain, EPS, 0.0, weight, plan=plan)
    return small_linear.head(x, gain, EPS, 0.0, weight, plan=plan)


def expected(product: Product, inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> Tensor:
    """The same in float64, with the normed row rounded as the activations are."""
    x, gain, residual = (t.double() for t in inputs)
    if product.kind != "add":
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain).bfloat16().double()
    y = x @ weight.double().t()
    if product.kind == "gated":
        first, second = y.chunk(2, -1)
        return torch.nn.functional.silu(first) * second
    return y + residual if product.kind == "add" else y


def relative_error(product: Product, rows: int, plan: Plan | None) -> float:
    inputs, weight = make_inputs(product, rows), make_weight(product)
    want = expected(product, inputs, weight)
    return float((call(product, inputs, weight, plan).double() - want).norm() / want.norm())


def graph_seconds(run: Callable[[], object], launches: int, replays: int = 3) -> float:
    """Median time of one of the `launches` of a captured run."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    graph.replay()
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2] / launches


def product_seconds(product: Product, rows: int, plan: Plan | None, weights: list[Tensor]) -> float:
    inputs = make_inputs(product, rows)
    turns = weights * max(1, 12 // len(weights))
    return graph_seconds(lambda: [call(product, inputs, weight, plan) for weight in turns], len(turns))


def chain_weights(model: str, layers: int | None = None) -> list[tuple[Product, Tensor]]:
    """All products of a model in order, each with a weight of its own, then the head."""
    every, products, last = MODELS[model]
    layers = layers or every
    return [(product, make_weight(product)) for _ in range(layers) for product in products] + [
        (last, make_weight(last))
    ]


def chain_seconds(chain: list[tuple[Product, Tensor]], rows: int, plans: dict[Product, Plan] | None) -> float:
    """One captured run of a chain. plans: for each product; None = the table's."""
    inputs = {product: make_inputs(product, rows) for product, _ in chain}
    plans = plans or {}

    def run() -> None:
        for product, weight in chain:
            call(product, inputs[product], weight, plans.get(product))

    return graph_seconds(run, 1)


def print_chain(model: str, row_counts: list[int], bandwidth: float, named: dict[str, dict[int, dict]]) -> None:
    """named: sets of plans, each by rows and product."""
    chain = chain_weights(model)
    total = sum(product.weight_bytes for product, _ in chain)
    for rows in row_counts:
        for name, plans in named.items():
            seconds = chain_seconds(chain, rows, plans.get(rows))
            print(f"{model} chain rows {rows:3d}: {seconds * 1e3:7.3f} ms, {total / seconds / bandwidth:5.1%}, "
                  f"floor {total / bandwidth * 1e3:.3f} ms, {name}", flush=True)  # fmt: skip


def library_plans(model: str, row_counts: list[int]) -> dict[int, dict]:
    return {rows: dict.fromkeys((*MODELS[model][1], MODELS[model][2]), LIBRARY) for rows in row_counts}


def vector_plans(product: Product) -> Iterator[Plan]:
    """Those that keep enough bytes in flight and leave the next kernel's programs room beside them."""
    padded = 1 << (product.inner - 1).bit_length()
    for block_out, warps, stages, programs in itertools.product((1, 2, 4, 8), (4, 8), (2, 3, 4, 5), (1, 2, 3, 4)):
        size = block_out * padded * 2 * (2 if product.kind == "gated" else 1)
        shared = (stages - 1) * size * programs
        fits = 48_000 <= shared <= 131_000 and size >= 4096
        if fits and padded // (32 * warps) <= 64 and warps * programs <= 16:
            yield Plan(kernel="vector", block_out=block_out, warps=warps, stages=stages, programs=programs)


def tile_plans(product: Product, rows: int) -> Iterator[Plan]:
    gated = product.kind == "gated"
    outs = product.num_out // 2 if gated else product.num_out
    width = max(8, rows)
    for block_out, block_in, splits, stages, request, apart in itertools.product(
        (16, 32, 64, 128), (64, 128, 256), (1, 2, 3, 4, 6, 8), (3, 4, 5, 7), (0, 4, 8), (False, True)
    ):
        count, blocks = -(-outs // block_out) * splits, -(-product.inner // block_in)
        if blocks % splits or blocks // splits < 4 or (splits > 1 and count > 800) or count < 60:
            continue
        shared = (stages - 1) * 2 * block_in * (block_out * (2 if gated else 1) + width)
        if not 30_000 <= shared <= 160_000 or block_out * width * (1 + gated) > 64 * 256:
            continue
        if count <= 264 and -(-count // 132) * shared > 116_000:
            continue
        if apart and product.kind == "add":
            continue
        yield Plan(kernel="tile", block_out=block_out, block_in=block_in, splits=splits, stages=stages,
                   warps=8 if block_out == 128 else 4, request=request, norm_apart=apart)  # fmt: skip


def plans_of(product: Product, rows: int) -> list[Plan]:
    return list(vector_plans(product) if rows == 1 else tile_plans(product, rows))


Job = tuple[Product, int, Plan]


def compile_jobs(jobs: multiprocessing.Queue[Job | None], done: multiprocessing.Queue[tuple[Job, float]]) -> None:
    """A worker: runs each plan once, so that the timing process finds it compiled, and checks it."""
    while (job := jobs.get()) is not None:
        product, rows, plan = job
        error = float("nan")
        try:
            error = relative_error(product, rows, plan)
        except Exception as problem:
            print("not possible:", product.name, rows, short(plan), repr(problem)[:100], flush=True)
        done.put((job, error))


class Crew:
    """Processes that compile plans and check them, 14 at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._todo: multiprocessing.Queue[Job | None] = context.Queue()
        self._done: multiprocessing.Queue[tuple[Job, float]] = context.Queue()
        self._workers = [
            context.Process(target=compile_jobs, args=(self._todo, self._done), daemon=True) for _ in range(14)
        ]
        for worker in self._workers:
            worker.start()

    def compile(self, jobs: list[Job], seconds: float) -> list[Job]:
        """Those that were compiled, and were right, within this time."""
        random.Random(1).shuffle(jobs)
        for job in jobs:
            self._todo.put(job)
        until, fit, left = time.monotonic() + seconds, [], len(jobs)
        while left and time.monotonic() < until:
            try:
                job, error = self._done.get(timeout=1)
            except queue.Empty:
                continue
            left -= 1
            if error < 6e-3:
                fit.append(job)
            elif error == error:
                print("WRONG", error, job, flush=True)
        while left:  # what nobody has begun
            try:
                self._todo.get(timeout=0.2)
                left -= 1
            except queue.Empty:
                break
        print(f"compiled {len(fit)} of {len(jobs)} plans, {left} not reached", flush=True)
        return fit

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()


def sweep(models: list[str], row_counts: list[int], bandwidth: float, most: int, seconds: float, seed: int) -> None:
    """Plans as neighbours in the chain of a model: product after product takes the plan that makes the chain fastest.

    A kernel by itself says too little: how well it starts beside the one before is a matter of both.
    """
    crew, chance = Crew(), random.Random(seed)
    jobs: list[Job] = []
    for model in models:
        for product, rows in itertools.product(MODELS[model][1], row_counts):
            plans = plans_of(product, rows)
            chance.shuffle(plans)
            jobs += [(product, rows, plan) for plan in plans[:most]]
    fit = crew.compile(jobs, seconds)
    crew.close()
    best: dict[int, dict[Product, Plan]] = {rows: {} for rows in row_counts}
    for model in models:
        products = MODELS[model][1]
        chain = chain_weights(model, 6 if model == "8b" else 28)[:-1]
        for rows in row_counts:
            now = {p: plan_of(rows, p.num_out, p.inner, p.kind == "gated") for p in products}
            for _ in range(2):
                for product in products:
                    plans = [now[product], LIBRARY, *(plan for p, r, plan in fit if (p, r) == (product, rows))]
                    times = {plan: chain_seconds(chain, rows, now | {product: plan}) for plan in plans}
                    now[product] = min(times, key=times.__getitem__)
            best[rows] |= now
            for product in products:
                times = {
                    plan: chain_seconds(chain, rows, now | {product: plan})
                    for plan in [LIBRARY, *(plan for p, r, plan in fit if (p, r) == (product, rows))]
                }
                print(f"{model} {product.name} rows {rows}: chain {chain_seconds(chain, rows, now) * 1e6:.1f} us, "
                      f"with cuBLAS here {times[LIBRARY] * 1e6:.1f}", flush=True)  # fmt: skip
                for plan in sorted(times, key=times.__getitem__)[:3]:
                    print(f"   {times[plan] * 1e6:8.2f} us {json.dumps(short(plan))}", flush=True)
        del chain
        print_chain(model, row_counts, bandwidth, {"best": best, "cuBLAS": library_plans(model, row_counts)})


def short(plan: Plan) -> dict:
    """What of a plan is not default."""
    default = asdict(Plan(kernel=plan.kernel))
    return {name: value for name, value in asdict(plan).items() if name == "kernel" or value != default[name]}


def kernel_of(product: Product, rows: int, weight: Tensor) -> str:
    """The kernel that a product takes."""
    if product.kind == "head":
        return plan_of(rows, product.num_out, product.inner, False).kernel
    x = torch.empty(rows, product.inner, device="cuda", dtype=torch.bfloat16)
    activation = "silu" if product.kind == "gated" else ""
    return small_linear.choose(x, weight, activation, norm=product.kind != "add").kernel


def table(models: list[str], row_counts: list[int], bandwidth: float) -> None:
    """Each shape and each chain, by the table's plans and by cuBLAS with norm, residual and gate apart."""
    for model in models:
        for rows in row_counts:
            for product in (*MODELS[model][1], MODELS[model][2]):
                weights = [make_weight(product) for _ in range(max(1, min(64, (500 << 20) // product.weight_bytes)))]
                kernel = kernel_of(product, rows, weights[0])
                ours, library = (product_seconds(product, rows, p, weights) for p in (None, LIBRARY))
                print(f"{model} {product.name:8s} rows {rows:3d}: {ours * 1e6:7.2f} us, "
                      f"{product.weight_bytes / ours / bandwidth:5.1%} of the copy bandwidth, cuBLAS "
                      f"{library * 1e6:7.2f} us, {kernel}", flush=True)  # fmt: skip
                del weights
        print_chain(model, row_counts, bandwidth, {"ours": {}, "cuBLAS": library_plans(model, row_counts)})


def main(arguments: list[str], bandwidth: float) -> int:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["8b"], choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--most", type=int, default=40, help="plans of a shape and number of rows that a sweep tries")
    parser.add_argument("--seconds", type=float, default=45, help="for compiling a sweep's plans")
    parser.add_argument("--seed", type=int, default=0, help="which of a sweep's plans")
    args = parser.parse_args(arguments)
    if args.sweep:
        sweep(args.models, args.rows, bandwidth, args.most, args.seconds, args.seed)
        return 0
    table(args.models, args.rows, bandwidth)
    return 0


if __name__ == "__main__":
    from bench.ceilings import copy_bandwidth

    sys.exit(main(sys.argv[1:], copy_bandwidth()))
