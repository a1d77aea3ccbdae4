"""Answers of the whole engine with the jax backend over replicas, as JSON. Run by test_replicas.py.

python -m tests.backends.replica_runs MODEL DPxTP[xTURNS][/KV_CACHE_DTYPE][:BUNDLE]...    a process of eight CPU devices
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from backends.jax.programs import ProgramSet
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
            "allowed_token_ids": [*range(2, 90)],
        }
        scored = plain | {"logprobs": 2, "prompt_logprobs": 1}
        params.append(SamplingParams(**(plain, sampled, scored)[i % 4 % 3]))
    return prompts, params


def count_turns() -> list[int]:
    """A number that counts the calls of programs of several turns from now on."""
    count, plain = [0], ProgramSet.turns

    def turns(self: ProgramSet, *args: Any) -> Any:
        count[0] += 1
        return plain(self, *args)

    ProgramSet.turns = turns
    return count


def run(model: str, sizes: tuple[int, int, int], kv_dtype: str, bundle: str) -> dict[str, Any]:
    """sizes: replicas, ranks, turns of a step."""
    replicas, ranks, turns = sizes
    pages: dict[str, Any] = {"executables": bundle} if bundle else {"num_gpu_blocks_override": PAGES}
    llm = LLM(
        model, backend="jax", device="cpu", dtype="float32", data_parallel_size=replicas, tensor_parallel_size=ranks,
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, block_size=16, skip_tokenizer_init=True,
        show_progress=False, num_scheduler_steps=turns, kv_cache_dtype=kv_dtype, **pages,
    )  # fmt: skip
    several = count_turns()
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
        "several": several[0],
    }
    llm.shutdown()
    return found


def main() -> None:
    found = {}
    for case in sys.argv[2:]:
        shape, _, bundle = case.partition(":")
        sizes, _, kv_dtype = shape.partition("/")
        replicas, ranks, turns = map(int, [*sizes.split("x"), 1][:3])
        found[case] = run(sys.argv[1], (replicas, ranks, turns), kv_dtype or "auto", bundle)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
