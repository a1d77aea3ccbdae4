"""Scores the default model on the CPU with transformers as the reference implementation.

Run last, by hand: `python bench/default_model/evaluate.py --work .train --model engine/data/default_model`. It prints
what MODEL_CARD.md quotes: bits per byte over the held-out files, how many held-out functions are completed greedily
to something that parses, and samples.
Always true: it uses only the shipped files and the held-out text; a token is scored once, with at least half the
context before it where the file has that much; the functions are chosen by hash, not by how well they come out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
from pathlib import Path

import torch
import transformers
from prepare import Function, Source, functions_of

CHAT_PROMPTS = [  # what was trained on, nearly trained on, and new
    "Who are you?",
    "Write a function that computes the factorial of n.",
    "Write a Python function `is_subset(a, b)` that returns whether every item of a is in b.",
]
MAX_NEW_TOKENS = 200


@torch.no_grad()
def held_out_bits(model: transformers.PreTrainedModel, ids: list[int], max_len: int) -> float:
    """Bits of a file's tokens after <|endoftext|> (id 0), in windows of max_len that advance by half."""
    bits, scored_end = 0.0, 1  # tokens [1, scored_end) have been counted
    tokens = torch.tensor([0, *ids])
    while scored_end < len(tokens):
        start = max(0, scored_end - max_len // 2)
        end = min(len(tokens), start + max_len)
        log_probs = model(tokens[None, start : end - 1]).logits[0].float().log_softmax(-1)
        # The logits at position i predict token i + 1.
        log_probs = log_probs[scored_end - 1 - start :]
        bits -= float(log_probs.gather(1, tokens[scored_end:end, None]).sum()) / math.log(2)
        scored_end = end
    return bits


def prompts_of(functions: list[Function]) -> list[tuple[str, str]]:
    """(name, signature and docstring) of functions with 3 to 15 lines of body after a docstring, in the order of
    their hashes.
    """
    prompts = []
    for function in sorted(functions, key=lambda f: hashlib.sha256(f.qualified_name.encode()).hexdigest()):
        node = ast.parse(function.code).body[0]
        assert isinstance(node, ast.FunctionDef)
        lines = function.code.split("\n")
        if ast.get_docstring(node) and 3 <= len(lines) - (node.body[0].end_lineno or 0) <= 15:
            prompts.append((function.qualified_name, "\n".join(lines[: node.body[0].end_lineno]) + "\n"))
    return prompts


@torch.no_grad()
def complete(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(
        ids,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        attention_mask=torch.ones_like(ids),
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def body_of(completion: str) -> str:
    """The completion up to the first line that leaves the function; its last line is dropped when the token limit
    cut it.
    """
    lines = completion.split("\n")
    kept: list[str] = []
    for line in lines:
        if line.strip() and not line.startswith(" "):
            return "\n".join(kept).rstrip()
        kept.append(line)
    return "\n".join(kept[:-1]).rstrip()


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".train"))
    parser.add_argument("--model", type=Path, default=Path("engine/data/default_model"))
    parser.add_argument("--num-functions", type=int, default=40)
    parser.add_argument("--num-shown", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    # f32 arithmetic over the bf16 weights.
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    files: dict[str, str] = json.loads((args.work / "corpus.json").read_text())["heldout_files"]

    bits, num_bytes, num_tokens = 0.0, 0, 0
    for name, text in files.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        file_bits, file_bytes = held_out_bits(model, ids, model.config.max_position_embeddings), len(text.encode())
        print(f"{file_bits / file_bytes:7.3f} bits/byte {file_bytes:7} bytes  {name}")
        bits, num_bytes, num_tokens = bits + file_bits, num_bytes + file_bytes, num_tokens + len(ids)
    print(
        f"held out: {bits / num_bytes:.4f} bits/byte, {num_tokens / num_bytes:.4f} tokens/byte, "
        f"{bits / num_tokens:.4f} bits/token, "
        f"{len(files)} files, {num_bytes} bytes"
    )

    functions = [f for name, text in files.items() for f in functions_of(Source(name=name, text=text, is_test=False))]
    prompts = prompts_of(functions)[: args.num_functions]
    num_parsed = 0
    for i, (name, prompt) in enumerate(prompts):
        body = body_of(complete(model, tokenizer, prompt))
        is_parsed = bool(body.strip()) and parses(prompt + body)
        num_parsed += is_parsed
        if i < args.num_shown:
            print(f"\n--- {name}: {'parses' if is_parsed else 'does not parse'}\n{prompt}{body}")
    print(f"\n{num_parsed} of {len(prompts)} greedy completions of held-out functions parse")
    for ask in CHAT_PROMPTS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}], add_generation_prompt=True, tokenize=False
        )
        print(f"\n--- user: {ask}\n{complete(model, tokenizer, prompt)}")


if __name__ == "__main__":
    main()
