"""Both backends on one GPU with a Llama-3.1-8B-shaped dummy model: decode, prefill and start-up, beside the floor.

    python bench/gpu.py --backend torch [--layers 32] [--batches 1,8,32]

Prints the copy bandwidth of the same run, then per batch the step time (slope between two output lengths), its ratio to
the time that reading weights and KV once would take at that bandwidth, and the prefill of 2048 tokens. Dummy weights,
ignore_eos, greedy; no tokenizer. Runs the whole engine (scheduler, overlap, runner) through `LLM`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=("torch", "jax"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--bandwidth", type=float, help="bytes a second, when torch cannot measure it here")
    args = parser.parse_args()

    from twinfer import LLM, SamplingParams

    config = LLAMA_8B | {"num_hidden_layers": args.layers}
    bandwidth = args.bandwidth or copy_bandwidth()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        begun = time.perf_counter()
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            backend=args.backend,
            max_model_len=4096,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        print(
            f"{args.backend}: ready in {time.perf_counter() - begun:.1f} s; copy {bandwidth / 1e12:.2f} TB/s",
            flush=True,
        )

        def seconds(batch: int, prompt: int, tokens: int) -> float:
            prompts = [{"prompt_token_ids": rng.integers(0, 128000, prompt).tolist()} for _ in range(batch)]
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            taken = time.perf_counter() - start
            counts = {len(output.outputs[0].token_ids) for output in outputs}
            if counts != {tokens}:
                sys.exit(f"asked for {tokens} tokens, got {sorted(counts)}")
            return taken

        kv_bytes = 2 * 2 * args.layers * 8 * 128
        for batch in (int(n) for n in args.batches.split(",")):
            seconds(batch, PROMPT, SHORT)  # warm
            steps = [(seconds(batch, PROMPT, LONG) - seconds(batch, PROMPT, SHORT)) / (LONG - SHORT) for _ in range(3)]
            step = float(np.median(steps))
            floor = (weight_bytes(config) + batch * (PROMPT + LONG / 2) * kv_bytes) / bandwidth
            print(
                f"decode batch {batch:4d}: {step * 1e3:8.2f} ms a step "
                f"({min(steps) * 1e3:.2f}-{max(steps) * 1e3:.2f}), "
                f"{batch / step:8.0f} tok/s, {step / floor:5.2f} x floor ({floor * 1e3:.2f} ms)",
                flush=True,
            )
        first = sorted(seconds(1, args.prefill, 1) for _ in range(4))
        print(
            f"prefill {args.prefill}: {first[1] * 1e3:.1f} ms to the first token (best {first[0] * 1e3:.1f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
