"""Answers of the whole engine with the jax backend over replicas, as JSON. Run by test_replicas.py.

python -m tests.backends.replica_runs MODEL DPxTP[/KV_CACHE_DTYPE][:BUNDLE]...    in a process of eight CPU devices
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from twinfer import LLM, SamplingParams

PAGES = 24


def requests() -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    """24 requests of 1 to 90 prompt tokens, two thirds with the same beginning; greedy, sampled and scored ones."""
    rng = np.random.default_rng(1)
    shared = rng.integers(1, 90, 64).tolist()
    prompts, params = [], []
    for i in range(24):
        prompt = rng.integers(1, 90, int(rng.integers(1, 26))).tolist()
        prompts.append({"prompt_token_ids": prompt if i % 3 == 0 else shared + prompt})
        plain: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4 + i % 7, "ignore_eos": True}
        sampled = plain | {
            "temperature": 1.0,
            "seed": i,
            "top_k": 40,
            "repetition_penalty": 1.2,
            "logit_bias": {3: 1.0},
        }
        scored = plain | {"logprobs": 2, "prompt_logprobs": 1}
        params.append(SamplingParams(**(plain, sampled, scored)[i % 4 % 3]))
    return prompts, params


def run(model: str, replicas: int, ranks: int, kv_dtype: str, bundle: str) -> dict[str, Any]:
    pages: dict[str, Any] = {"executables": bundle} if bundle else {"num_gpu_blocks_override": PAGES}
    llm = LLM(
        model, backend="jax", device="cpu", dtype="float32", data_parallel_size=replicas, tensor_parallel_size=ranks,
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, block_size=16, skip_tokenizer_init=True,
        show_progress=False, num_scheduler_steps=1, kv_cache_dtype=kv_dtype, **pages,  # replicas take one turn a step
    )  # fmt: skip
    prompts, params = requests()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids)]
            for output in outputs
            if output.outputs[0].logprobs
        ],
        "prompt": [
            [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
            for output in outputs
            if output.prompt_logprobs
        ],
        "num_compiles": llm.ready.num_compiles,
        "num_pages": llm.ready.num_pages,
    }
    llm.shutdown()
    return found


def main() -> None:
    found = {}
    for case in sys.argv[2:]:
        shape, _, bundle = case.partition(":")
        sizes, _, kv_dtype = shape.partition("/")
        replicas, ranks = map(int, sizes.split("x"))
        found[case] = run(sys.argv[1], replicas, ranks, kv_dtype or "auto", bundle)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
