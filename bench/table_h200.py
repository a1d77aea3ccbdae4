"""The work of one H200 that vLLM 0.25.1 was measured with, run on ours, with the floors of the same run beside it.

    python bench/serve.py --table h200 [--only decode,throughput,ttft,prefix,small,start]

bf16, dummy weights, random prompts, ignore_eos, greedy, no tokenizer, the whole engine through `LLM` with its defaults.
A decode step is the median gap between outputs of the full batch, as it was for vLLM.
A floor is max(weight bytes / copy bandwidth, operations / rate of large products) + KV bytes / bandwidth, for ours with
the ceilings of this run, for vLLM with those of its own (4.3 TB/s, 670 TFLOP/s). The last column is
(ours / its floor) / (vLLM / its floor). vLLM's figures were taken on another day, on another machine of this kind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.ceilings import copy_bandwidth, linear_rate
from bench.gpu import LLAMA_8B
from bench.shapes import QWEN3_06B
from cuda_kernels.compiles import count, names
from engine.core.messages import StepOutputs
from engine.core.timeline import table

ROOT = Path(__file__).resolve().parent.parent
VLLM_BANDWIDTH, VLLM_RATE = 4.3e12, 670e12

# (work, vLLM's figure in ms or s, must, goal) as ratios ours / vLLM
DECODE = {  # (batch, prompt, outputs): (vLLM ms, must, goal)
    (1, 128, 256): (4.94, 0.90, 0.84),
    (8, 128, 256): (5.08, 0.90, 0.83),
    (32, 128, 256): (5.56, 0.90, 0.83),
    (64, 128, 256): (6.11, 0.90, 0.83),
    (128, 128, 256): (7.53, 0.87, 0.80),
    (256, 128, 256): (11.4, 0.87, 0.80),
    (64, 2048, 128): (9.66, 0.95, 0.91),
}
SMALL_DECODE = {(1, 128, 256): (1.6, 0.5, 0.3), (32, 128, 256): (1.95, 0.6, 0.4), (256, 128, 256): (4.8, 0.7, 0.5)}
TTFT = {8192: (219.0, 1.0, 0.93), 512: (17.0, 0.9, 0.75)}
THROUGHPUT = {"A1": (1000, 1024, 128, 33.1, 0.96, 0.90), "A2": (512, 256, 512, 15.55, 0.92, 0.87)}
PREFIX = (0.54, 1.0, 0.9)
START = (76.0, 30.0)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, for floors."""

    config: dict[str, Any]

    @property
    def products(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's weights."""
        c = self.config
        heads, kv, size, d, f = (
            c[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size")
        )
        return [((heads + 2 * kv) * size, d), (d, heads * size), (2 * f, d), (d, f)]

    @property
    def layer_weights(self) -> int:
        return self.config["num_hidden_layers"] * sum(out * inner for out, inner in self.products)

    @property
    def weights(self) -> int:
        return self.layer_weights + self.config["vocab_size"] * self.config["hidden_size"]

    @property
    def kv_bytes(self) -> int:
        """Of a token."""
        c = self.config
        return 4 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]

    def decode_floor(self, batch: int, context: float, bandwidth: float, rate: float) -> float:
        products = max(2 * self.weights / bandwidth, 2 * self.weights * batch / rate)
        return products + batch * context * self.kv_bytes / bandwidth

    def prefill_floor(self, tokens: int, rate: float, bandwidth: float, prompts: int = 1) -> float:
        """Of all prompts of `tokens` tokens each, the weights read once."""
        c = self.config
        attention = 2 * tokens**2 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"]
        return max(prompts * (2 * self.layer_weights * tokens + attention) / rate, 2 * self.weights / bandwidth)


class Bench:
    """One engine and its ceilings."""

    def __init__(self, config: dict[str, Any], bandwidth: float, rate: float, **options: Any) -> None:
        from twinfer import LLM

        self.shape, self.bandwidth, self.rate = Shape(config), bandwidth, rate
        self.vocab = config["vocab_size"]
        self.rng = np.random.default_rng(0)
        with model_folder(config) as folder:
            begun = time.perf_counter()
            self.llm = LLM(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=32768,
                **{"backend": "torch"} | options,
            )
            self.compiled = count()
            print(f"  engine ready in {time.perf_counter() - begun:.1f} s: {self.llm.ready.startup_s}", flush=True)

    def tell_compiles(self) -> None:
        late = names()[self.compiled :]
        print(f"  kernels compiled since ready: {len(late)}", *sorted(set(late)), sep="\n    ", flush=True)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return self.rng.integers(0, self.vocab, (count, length)).tolist()

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """Of a whole generate call; every output length is checked."""
        from twinfer import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        taken = time.perf_counter() - start
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        if len(outputs) != len(prompts) or counts != {tokens}:
            sys.exit(f"asked for {len(prompts)} x {tokens} tokens, got {len(outputs)} x {sorted(counts)}")
        return taken

    def full_steps(self, batch: int, prompt: int, tokens: int) -> tuple[float, float, list[float]]:
        """(seconds of a generate call, when its first step ended, gaps between steps that gave `batch` tokens)."""
        core = self.llm._client._core
        plain, ends = core.step, []

        def timed() -> list[Any]:
            messages = plain()
            ends.extend((time.perf_counter(), len(m.keys) // 8) for m in messages if isinstance(m, StepOutputs))
            return messages

        core.step = timed
        try:
            begun = time.perf_counter()
            whole = self.seconds(self.prompts(batch, prompt), tokens)
        finally:
            del core.step
        gaps = [b - a for (a, n), (b, m) in itertools.pairwise(ends) if n == m == batch]
        return whole, ends[0][0] - begun if ends else 0.0, gaps

    def decode(self, table: dict[tuple[int, int, int], tuple[float, float, float]], repeats: int) -> None:
        for (batch, prompt, outputs), (theirs, must, goal) in table.items():
            steps, wholes = [], []
            for _ in range(repeats):
                whole, _, gaps = self.full_steps(batch, prompt, outputs)
                steps.append(float(np.median(gaps)) * 1e3)
                wholes.append(whole)
            context = prompt + outputs / 2
            floor = self.shape.decode_floor(batch, context, self.bandwidth, self.rate) * 1e3
            their_floor = self.shape.decode_floor(batch, context, VLLM_BANDWIDTH, VLLM_RATE) * 1e3
            report(f"decode x{batch} {prompt}/{outputs}", "ms", steps, floor, theirs, their_floor, must, goal)
            mean = float(np.mean(gaps)) * 1e3
            print(
                f"    whole call {min(wholes):.2f} s; {len(gaps)} gaps, mean {mean:.2f} ms, worst {max(gaps) * 1e3:.1f}"
            )

    def ttft(self) -> None:
        for length, (theirs, must, goal) in TTFT.items():
            times = [self.seconds(self.prompts(1, length), 1) * 1e3 for _ in range(5)][1:]
            floor = self.shape.prefill_floor(length, self.rate, self.bandwidth) * 1e3
            their_floor = self.shape.prefill_floor(length, VLLM_RATE, VLLM_BANDWIDTH) * 1e3
            report(f"first token of {length}", "ms", times, floor, theirs, their_floor, must, goal)

    def throughput(self, names: list[str]) -> None:
        for name in names:
            count, prompt, outputs, theirs, must, goal = THROUGHPUT[name]
            times = [self.seconds(self.prompts(count, prompt), outputs)]
            floor = self.whole_floor(count, prompt, outputs, self.bandwidth, self.rate)
            their_floor = self.whole_floor(count, prompt, outputs, VLLM_BANDWIDTH, VLLM_RATE)
            report(f"{name}: {count} x {prompt}/{outputs}", "s", times, floor, theirs, their_floor, must, goal)

    def whole_floor(self, count: int, prompt: int, outputs: int, bandwidth: float, rate: float) -> float:
        """All prompts, then all outputs at once."""
        prefill = self.shape.prefill_floor(prompt, rate, bandwidth, count)
        return prefill + outputs * self.shape.decode_floor(count, prompt + outputs / 2, bandwidth, rate)

    def prefix(self) -> None:
        theirs, must, goal = PREFIX
        shared = self.prompts(1, 4096)[0]
        self.seconds([shared], 1)
        times = [self.seconds([shared + own for own in self.prompts(64, 64)], 32) for _ in range(3)]
        shape = self.shape
        floor, their_floor = (
            shape.prefill_floor(64, rate, bandwidth, 64) + 31 * shape.decode_floor(64, 4176, bandwidth, rate)
            for bandwidth, rate in ((self.bandwidth, self.rate), (VLLM_BANDWIDTH, VLLM_RATE))
        )  # fmt: skip
        report("64 x (4096 shared + 64)/32, warm", "s", times, floor, theirs, their_floor, must, goal)


def report(
    work: str, unit: str, taken: list[float], floor: float, theirs: float, their_floor: float, must: float, goal: float
) -> None:
    ours = float(np.median(taken))
    ratio = (ours / floor) / (theirs / their_floor)
    verdict = "goal" if ratio <= goal else "met" if ratio <= must else "MISSED"
    print(
        f"{work:34s} ours {ours:8.2f} {unit} ({min(taken):.2f}-{max(taken):.2f})"
        f"  {ours / floor:5.2f} x floor {floor:7.2f}  vLLM {theirs:7.2f} ({theirs / their_floor:5.2f} x)"
        f"  ours/vLLM {ratio:5.2f} must {must:.2f} goal {goal:.2f}"
        f"  {verdict}",
        flush=True,
    )


@contextmanager
def model_folder(config: dict[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


def start_up() -> None:
    """Process start to first token, with empty and with warm caches, and where the time goes."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[2]); from twinfer import LLM, SamplingParams; "
        "from engine.core.timeline import process_age_s; from cuda_kernels.compiles import count; "
        "llm = LLM(sys.argv[1], load_format='dummy', skip_tokenizer_init=True, max_model_len=32768, backend='torch'); "
        "ready = process_age_s(); "
        "params = SamplingParams(max_tokens=1, detokenize=False); "
        "llm.generate([{'prompt_token_ids': [5] * 128}], params, use_tqdm=False); "
        "print(json.dumps([llm.ready.startup_s, ready, process_age_s(), count()]), flush=True)"
    )
    with model_folder(LLAMA_8B) as folder, tempfile.TemporaryDirectory() as cache:
        places = {"TRITON_CACHE_DIR": f"{cache}/triton", "TWINFER_CACHE_DIR": f"{cache}/twinfer"}
        for name, theirs in zip(("empty", "warm"), START, strict=True):
            command = [sys.executable, "-c", program, folder, str(ROOT)]
            done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            spans, ready, first_token, variants = json.loads(done.stdout.splitlines()[-1])
            print(
                f"start to first token, {name} caches  ours {first_token:6.1f} s  vLLM {theirs:.0f}"
                f"  ours/vLLM {first_token / theirs:.2f} must 0.50 goal 0.33"
                f"  {variants} kernel variants, spans cover {sum(spans.values()) / ready:.1%} of {ready:.2f} s to ready"
            )
            print(table({**spans, "first step": first_token - ready}), flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="decode,ttft,prefix,throughput,small,start")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batches", help="only these batch sizes of the decode tables")
    wanted = parser.parse_args(arguments)
    parts = set(wanted.only.split(","))
    bandwidth = copy_bandwidth()
    rate = linear_rate(8192, Shape(LLAMA_8B).products)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, products of 8192 tokens {rate / 1e12:.0f} TFLOP/s", flush=True)

    def chosen(table: dict[tuple[int, int, int], Any]) -> dict[tuple[int, int, int], Any]:
        batches = None if wanted.batches is None else {int(n) for n in wanted.batches.split(",")}
        return {key: value for key, value in table.items() if batches is None or key[0] in batches}

    if parts & {"decode", "ttft", "prefix", "throughput"}:
        bench = Bench(LLAMA_8B, bandwidth, rate)
        bench.seconds(bench.prompts(2, 64), 4)
        if "decode" in parts:
            bench.decode(chosen(DECODE), wanted.repeats)
        if "ttft" in parts:
            bench.ttft()
        if "prefix" in parts:
            bench.prefix()
        if "throughput" in parts:
            bench.throughput(["A1", "A2"])
        bench.tell_compiles()
        bench.llm.shutdown()
        del bench
    if "small" in parts:
        small = Bench(QWEN3_06B, bandwidth, rate)
        small.seconds(small.prompts(2, 64), 4)
        small.decode(chosen(SMALL_DECODE), wanted.repeats)
        small.tell_compiles()
        small.llm.shutdown()
        del small
    if "start" in parts:
        start_up()
    return 0
