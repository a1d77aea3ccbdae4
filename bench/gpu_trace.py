"""Where a GPU's time goes in decode: its idle share, launches a step, the kernels that take longest.

    python bench/gpu_trace.py [--model 8b|0.6b] [--batch 64] [--prompt 128] [--steps 40] [--layers N] [--backend jax]

A trace of torch's or jax's profiler over the middle of one generate call. Busy is the union of all intervals of kernels
and copies; what is not busy beside a copy from or to the host lies between steps, the rest between the kernels of one.
A step's launches are all launches over the steps of the window. The profiler itself slows the host a little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

# in place of this folder: bench/kernels.py is no library
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu import MODELS
from bench.table_h200 import Bench

Event = tuple[float, float, str]
SKIPPED = 0.25  # share of the trace at each end that is left out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("8b", "0.6b"), default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--backend", choices=("torch", "jax"), default="torch")
    args = parser.parse_args()
    config = dict(MODELS[args.model])
    if args.layers:
        config["num_hidden_layers"] = args.layers
    bench = Bench(config, 1.0, 1.0, backend=args.backend, max_num_seqs=args.max_num_seqs)
    bench.seconds(bench.prompts(args.batch, args.prompt), 4)
    record = torch_events if args.backend == "torch" else jax_events
    trace(record(bench, args.batch, args.prompt, args.steps), args)
    return 0


def torch_events(bench: Bench, batch: int, prompt: int, steps: int) -> list[Event]:
    """Start, end in us, and name of all that the device did."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        bench.seconds(bench.prompts(batch, prompt), 2 * steps)
    return sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in prof.events()
        if event.device_type.name == "CUDA"
    )


def jax_events(bench: Bench, batch: int, prompt: int, steps: int) -> list[Event]:
    """The same of jax's profiler."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            bench.seconds(bench.prompts(batch, prompt), 2 * steps)
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        return sorted(
            (event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3, event.name)
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )


def trace(events: list[Event], args: argparse.Namespace) -> None:
    """Print what the middle of the events tells."""
    first, last = events[0][0], max(end for _, end, _ in events)
    low, high = first + SKIPPED * (last - first), last - SKIPPED * (last - first)
    inside = [event for event in events if low <= event[0] and event[1] <= high]
    span = inside[-1][1] - inside[0][0]
    busy, between, reached, before = 0.0, 0.0, inside[0][0], ""
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for start, end, name in inside:
        busy += max(0.0, end - max(start, reached))
        if "Memcpy" in name or "Memcpy" in before:
            between += max(0.0, start - reached)
        before = name
        reached = max(reached, end)
        times[name] += end - start
        counts[name] += 1
    # one copy to the host ends a step
    turns = sum(count for name, count in counts.items() if "Memcpy DtoH" in name or "MemcpyD2H" in name)
    if not turns:
        sys.exit("the trace holds no copy to the host")
    print(
        f"batch {args.batch}, prompt {args.prompt}: {turns} steps in {span / 1e3:.2f} ms "
        f"({span / turns / 1e3:.3f} ms each), "
        f"idle {1 - busy / span:.2%}, between steps {between / span:.2%}, {len(inside) / turns:.0f} launches a step"
    )
    for name in sorted(times, key=lambda n: -times[n])[:14]:
        print(f"  {times[name] / turns:9.1f} us a step  {counts[name] / turns:6.1f} x  {name[:110]}")


if __name__ == "__main__":
    sys.exit(main())
