"""Decode with one turn a step and with several, on this machine's jax device: tokens a second through the whole engine.

    python -m bench.turns [--model default|llama32m|FOLDER] [--turns 1 8] [--streams 1 8] [--rounds 5]

One engine for each number of turns, all in this process, asked one after another in every round; medians of the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.cpu import DEFAULT_MODEL, prompts, write_llama32m

PROMPT, OUTPUTS = 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    from twinfer import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as scratch:
        path = DEFAULT_MODEL if args.model == "default" else Path(args.model)
        if args.model == "llama32m":
            path = Path(scratch)
            write_llama32m(path)
        options = {
            "skip_tokenizer_init": True,
            "dtype": args.dtype,
            "max_num_seqs": max(args.streams),
            "backend": "jax",
        }
        engines, started = {}, {}
        for turns in args.turns:
            begun = time.perf_counter()
            engines[turns] = LLM(str(path), num_scheduler_steps=turns, kv_cache_memory_bytes=256 << 20, **options)
            started[turns] = time.perf_counter() - begun
        print(f"{args.model} {args.dtype}: ready in " + ", ".join(f"{s:.1f} s ({k} turns)" for k, s in started.items()))
        params = SamplingParams(temperature=0, max_tokens=OUTPUTS, ignore_eos=True, detokenize=False)
        for streams in args.streams:
            asked = [{"prompt_token_ids": ids.tolist()} for ids in prompts(streams, PROMPT, 4000)]
            speeds: dict[int, list[float]] = {turns: [] for turns in engines}
            for _ in range(args.rounds + 1):  # the first warms up
                for turns, engine in engines.items():
                    begun = time.perf_counter()
                    engine.generate(asked, params, use_tqdm=False)
                    speeds[turns].append(streams * OUTPUTS / (time.perf_counter() - begun))
            found = {turns: np.sort(times[1:]) for turns, times in speeds.items()}
            print(
                f"{streams} streams: "
                + ", ".join(
                    f"{turns} turns {np.median(times):.0f} tok/s ({times[0]:.0f} .. {times[-1]:.0f})"
                    for turns, times in found.items()
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
