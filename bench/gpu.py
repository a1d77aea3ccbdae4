"""Both backends on one GPU with dummy models of real shapes: decode, prefill and start-up, beside the floor.

    python -m bench.gpu --backend torch [--model 8b] [--layers 32] [--batches 1,8,32]
    python -m bench.gpu --backend both [--models 8b,0.6b] [--batches 1,8,32,64,128,256]    in turn, and ratios

Prints the copy bandwidth of the same run, then per batch the step time (slope between two output lengths), its ratio to
the time that reading weights and KV once would take at that bandwidth, and the prefill of 2048 tokens. Dummy weights,
ignore_eos, greedy; no tokenizer. Runs the whole engine (scheduler, overlap, runner) through `LLM`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import shapes

LLAMA_8B: dict[str, object] = shapes.LLAMA_8B | {
    "head_dim": 128,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MODELS = {"8b": LLAMA_8B, "0.6b": shapes.QWEN3_06B}
PROMPT, SHORT, LONG = 128, 8, 72  # tokens


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device copy, with torch."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / float(np.median(times))


def weight_bytes(config: dict[str, object]) -> int:
    """Bytes read a decode step: every matrix once, not the embedding table."""
    d, f, layers, vocab = (
        int(str(config[k])) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    heads, kv, size = (int(str(config[k])) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    return 2 * (layers * (d * size * (heads + 2 * kv) + heads * size * d + 3 * d * f) + vocab * d)


class Engine:
    """One backend's engine on a dummy model."""

    def __init__(self, config: dict[str, object], folder: str, args: argparse.Namespace) -> None:
        from twinfer import LLM

        (Path(folder) / "config.json").write_text(json.dumps(config))
        self.rng = np.random.default_rng(0)
        self.vocab = int(str(config["vocab_size"]))
        self.llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            backend=args.backend,
            max_model_len=4096,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )

    def seconds(self, batch: int, prompt: int, tokens: int) -> float:
        from twinfer import SamplingParams

        prompts = [{"prompt_token_ids": self.rng.integers(0, self.vocab, prompt).tolist()} for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        taken = time.perf_counter() - start
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        if counts != {tokens}:
            sys.exit(f"asked for {tokens} tokens, got {sorted(counts)}")
        return taken

    def steps(self, batch: int) -> list[float]:
        """Seconds a decode step, three times, in order of size."""
        self.seconds(batch, PROMPT, SHORT)  # warm
        whole = LONG - SHORT
        return sorted(
            (self.seconds(batch, PROMPT, LONG) - self.seconds(batch, PROMPT, SHORT)) / whole for _ in range(3)
        )


def run_one(args: argparse.Namespace) -> dict[int, float]:
    """Seconds a decode step by batch, of one backend; the figures are printed as they come."""
    config: dict[str, object] = dict(MODELS[args.model])
    if args.layers:
        config["num_hidden_layers"] = args.layers
    bandwidth = args.bandwidth or copy_bandwidth()
    heads, size, layers = (int(str(config[k])) for k in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        engine = Engine(config, folder, args)
        ready = time.perf_counter() - begun
        print(f"{args.backend}, {args.model}: ready in {ready:.1f} s; copy {bandwidth / 1e12:.2f} TB/s", flush=True)
        for batch in (int(n) for n in args.batches.split(",")):
            steps = engine.steps(batch)
            step = found[batch] = steps[1]
            floor = (weight_bytes(config) + batch * (PROMPT + LONG / 2) * 4 * layers * heads * size) / bandwidth
            print(
                f"decode batch {batch:4d}: {step * 1e3:8.2f} ms a step ({steps[0] * 1e3:.2f}-{steps[2] * 1e3:.2f}), "
                f"{batch / step:8.0f} tok/s, {step / floor:5.2f} x floor ({floor * 1e3:.2f} ms)",
                flush=True,
            )
        first = sorted(engine.seconds(1, args.prefill, 1) for _ in range(4))
        print(
            f"prefill {args.prefill}: {first[1] * 1e3:.1f} ms to the first token (best {first[0] * 1e3:.1f})",
            flush=True,
        )
    return found


def run_both(args: argparse.Namespace) -> None:
    """Each backend in a process of its own, one after the other, and the ratios of their steps."""
    bandwidth = copy_bandwidth()
    for model in args.models.split(","):
        steps = []
        for backend in ("torch", "jax"):
            with tempfile.NamedTemporaryFile() as result:
                own = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in PASSED if getattr(args, name)]
                command = [sys.executable, "-m", "bench.gpu", f"--backend={backend}", f"--model={model}", *own]
                subprocess.run([*command, f"--bandwidth={bandwidth}", f"--result={result.name}"], check=True)
                steps.append({int(batch): step for batch, step in json.load(result).items()})
        for batch, step in steps[0].items():
            print(
                f"{model} batch {batch:4d}: torch {step * 1e3:.2f} ms, jax {steps[1][batch] * 1e3:.2f} ms, "
                f"jax / torch {steps[1][batch] / step:.2f}",
                flush=True,
            )


PASSED = ("layers", "batches", "prefill", "max_num_seqs", "max_num_batched_tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=("torch", "jax", "both"))
    parser.add_argument("--model", default="8b", choices=tuple(MODELS))
    parser.add_argument("--models", default="8b,0.6b", help="with --backend both")
    parser.add_argument("--layers", type=int, default=0, help="0: the model's own")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--bandwidth", type=float, help="bytes a second, when torch cannot measure it here")
    parser.add_argument("--result", help="file for the seconds a step by batch, as JSON")
    args = parser.parse_args()
    if args.backend == "both":
        run_both(args)
        return 0
    found = run_one(args)
    if args.result:
        Path(args.result).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
