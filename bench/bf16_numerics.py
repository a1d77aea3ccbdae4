"""How far bfloat16 is from float32 on the same weights: |difference| of log-probabilities, decode and prefill.

    python bench/bf16_numerics.py [--backend torch] [--model FOLDER] [--prompts 64] [--tokens 128]

A bfloat16 engine completes prompts greedily and tells the log-probability of each token that it gave (decode steps); a
float32 engine then scores the same texts as prompts. Both engines score the prompts themselves, too (prefill steps).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

# in place of this folder: bench/kernels.py is no library
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MEAN, TAIL = 0.02, 0.15  # nat: what a good bfloat16 engine stays under, on average and at the 99.9th percentile


def prompts(encode, count: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """Token ids of pieces of Python's standard library: text of the kind that the default model knows."""
    sources = sorted(Path(argparse.__file__).parent.glob("*.py"))
    rng = np.random.default_rng(0)
    chosen = [sources[i] for i in rng.choice(len(sources), count, replace=len(sources) < count)]
    return [encode(path.read_text(errors="replace")[: int(n)]) for path, n in zip(chosen, rng.integers(60, 600, count))]


def scored(llm, texts: list[list[int]]) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
    """Log-probabilities of each text's own tokens but the first."""
    from twinfer import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    return [
        np.array([at[token].logprob for at, token in zip(o.prompt_logprobs[1:], text[1:], strict=True)])
        for o, text in zip(outputs, texts, strict=True)
    ]


def told(name: str, differences: np.ndarray) -> bool:
    mean, tail = float(differences.mean()), float(np.quantile(differences, 0.999))
    good = mean <= MEAN and tail <= TAIL
    print(
        f"{name}: {len(differences)} tokens, mean |difference| {mean:.4f} (at most {MEAN}), 99.9 % {tail:.4f} "
        f"(at most {TAIL}), largest {differences.max():.4f}{'' if good else '  MISSED'}"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--model", default="")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    from twinfer import LLM, SamplingParams

    options = {"backend": args.backend, "max_num_seqs": 32}
    with LLM(args.model, dtype="bfloat16", **options) as half:
        asked = prompts(half.get_tokenizer().encode, args.prompts)
        params = SamplingParams(temperature=0, max_tokens=args.tokens, logprobs=0, ignore_eos=True, detokenize=False)
        outputs = half.generate([{"prompt_token_ids": text} for text in asked], params, use_tqdm=False)
        given = [list(o.outputs[0].token_ids) for o in outputs]
        decoded = [
            np.array([at[token].logprob for at, token in zip(o.outputs[0].logprobs, tokens, strict=True)])
            for o, tokens in zip(outputs, given, strict=True)
        ]
        prefilled = scored(half, asked)
    with LLM(args.model, dtype="float32", **options) as full:
        whole = scored(full, [text + tokens for text, tokens in zip(asked, given, strict=True)])
    decode = [a - b[-len(a) :] for a, b in zip(decoded, whole, strict=True)]
    prefill = [a - b[: len(a)] for a, b in zip(prefilled, whole, strict=True)]
    good = told("decode ", np.abs(np.concatenate(decode)))
    return 0 if told("prefill", np.abs(np.concatenate(prefill))) and good else 1


if __name__ == "__main__":
    sys.exit(main())
