"""Decode and prefill on the CPU: our runners, driven by hand-made plans, beside transformers `generate`, in one run.

    python -m bench.cpu [--models llama32m default] [--dtypes float32 bfloat16] [--streams 1 8] [--sides jax torch]
                        [--llama-python PATH]

With the python of an environment that has llama_cpp (llama-cpp-python and gguf) llama.cpp is a side too: float32 beside
its f32, bfloat16 beside its f16 and bf16 (llama32m alone; see bench/llama_cpp_side.py). --dtypes int8: the jax side
reads every linear weight, the head too, as int8 with a scale a row, inputs rounded per token, float32 between; beside
llama.cpp's Q8_0. transformers then runs the plain float32 weights.

Each side is a process of its own that is stopped (SIGSTOP) while another is timed, so that spinning threads of one do
not slow the other; turns are interleaved and the best of all rounds counts. transformers runs under OMP_WAIT_POLICY
ACTIVE and under the default, and the better of the two is what a ratio is taken against. Ratios above 1: we are faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.prompts import OUTPUTS, PREFILL, PROMPT, prompts

DEFAULT_MODEL = Path(__file__).parent.parent / "engine" / "data" / "default_model"


def write_llama32m(folder: Path) -> None:
    """A random Llama of 32 M parameters, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        intermediate_size=1408, vocab_size=8192, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_int8(plain: Path, folder: Path) -> None:
    """The Llama of `plain` with a scale a row, as compressed-tensors lays it out."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if tensor.ndim == 1 or "embed_tokens" in name:
            tensors[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        tensors[name] = torch.round(tensor / scale).to(torch.int8)
        tensors[name + "_scale"] = scale
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"], "weights": {**bits, "strategy": "channel"},
        "input_activations": {**bits, "strategy": "token", "dynamic": True},
    }  # fmt: skip
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": [],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


# transformers


class Transformers:
    def __init__(self, path: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.vocab_size = self.model.config.vocab_size

    def generate(self, ids: np.ndarray, outputs: int) -> float:
        """Seconds."""
        inputs = self.torch.from_numpy(ids.astype(np.int64))
        start = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(
                inputs, attention_mask=self.torch.ones_like(inputs), max_new_tokens=outputs, min_new_tokens=outputs,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - start

    def decode(self, streams: int) -> float:
        """Tokens a second after the first token."""
        ids = prompts(streams, PROMPT, self.vocab_size)
        first = min(self.generate(ids, 1) for _ in range(2))
        return streams * OUTPUTS / (self.generate(ids, OUTPUTS + 1) - first)

    def prefill(self) -> float:
        """Prompt tokens a second, the first output token included."""
        return PREFILL / self.generate(prompts(1, PREFILL, self.vocab_size), 1)


# our runners


class Ours:
    """One runner, given hand-made plans."""

    def __init__(self, backend: str, path: Path, dtype: str) -> None:
        from bench.plans import Driver
        from engine.config import CacheConfig, ModelConfig, ScheduleConfig

        self.driver = Driver(
            backend, path, ModelConfig(dtype=dtype), CacheConfig(kv_cache_memory_bytes=256 << 20),
            ScheduleConfig(max_num_seqs=8, max_num_batched_tokens=1024),
        )  # fmt: skip

    def decode(self, streams: int) -> float:
        driver = self.driver
        ids = prompts(streams, PROMPT, driver.vocab_size)
        rows = driver.open(streams, PROMPT + OUTPUTS)
        driver.run(driver.plan(rows, ids.reshape(-1), True, True))
        return streams * OUTPUTS / driver.steps(rows, OUTPUTS)[-1]

    def prefill(self) -> float:
        driver = self.driver
        ids = prompts(1, PREFILL, driver.vocab_size)[0]
        rows = driver.open(1, PREFILL)
        start = time.perf_counter()
        driver.run(driver.plan(rows, ids, True, True))
        return PREFILL / (time.perf_counter() - start)


# one process a side


def serve(side: str, path: Path, dtype: str) -> None:
    """Answer {"decode": streams} and {"prefill": 1} lines with tokens a second."""
    with contextlib.redirect_stdout(sys.stderr):
        model = Transformers(path, dtype) if side.startswith("hf") else Ours(side, path, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        speed = model.decode(task["decode"]) if "decode" in task else model.prefill()
        print(json.dumps(speed), flush=True)


class Side:
    """A process that is stopped unless it is asked."""

    def __init__(self, name: str, path: Path, dtype: str, llama_python: str = "") -> None:
        self.name = name
        env = dict(os.environ, TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
        if name == "hf-active":
            env["OMP_WAIT_POLICY"] = "ACTIVE"
        command = [sys.executable, "-m", "bench.cpu", "--serve", name, str(path), dtype]
        if name.startswith("llama.cpp"):
            command = [llama_python, "-m", "bench.llama_cpp_side", str(path), name.split()[1]]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        self.read()
        self.process.send_signal(signal.SIGSTOP)

    def read(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"the {self.name} side has ended")
        return line

    def ask(self, task: dict[str, int]) -> float:
        if self.process.stdin is None:
            raise RuntimeError(f"the {self.name} side has no input")
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        speed = float(json.loads(self.read()))
        self.process.send_signal(signal.SIGSTOP)
        return speed

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


PEERS = {
    "float32": ["llama.cpp f32"],
    "bfloat16": ["llama.cpp f16", "llama.cpp bf16"],
    "int8": ["llama.cpp q8_0"],
}


def compare(path: Path, dtype: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{task: {side: best tokens a second}}."""
    streams, rounds = args.streams, args.rounds
    peers = PEERS[dtype] if args.llama_python else []
    tasks: list[tuple[str, dict[str, int]]] = [(f"decode x{n}", {"decode": n}) for n in streams]
    tasks.append((f"prefill {PREFILL}", {"prefill": 1}))
    running: list[Side] = []
    activations = "float32" if dtype == "int8" else dtype
    ours = path.with_name(path.name + "-int8") if dtype == "int8" else path
    if dtype == "int8" and not ours.exists():
        write_int8(path, ours)
    try:
        for name in [*args.sides, "hf-default", "hf-active", *peers]:
            folder = ours if name in args.sides else path
            running.append(Side(name, folder, activations, args.llama_python))
        best: dict[str, dict[str, float]] = {name: {} for name, _ in tasks}
        for _ in range(rounds + 1):  # the first round warms up, and counts if it is the best
            for name, task in tasks:
                for side in running:
                    best[name][side.name] = max(best[name].get(side.name, 0.0), side.ask(task))
        return best
    finally:
        for side in running:
            side.end()


def report(model: str, dtype: str, best: dict[str, dict[str, float]], sides: list[str]) -> None:
    for task, speeds in best.items():
        theirs = max(speeds["hf-default"], speeds["hf-active"])
        ours = "  ".join(f"{side} {speeds[side]:8.0f} ({speeds[side] / theirs:4.2f}x)" for side in sides)
        print(
            f"{model:9} {dtype:9} {task:13} {ours}  hf {speeds['hf-default']:7.0f} default {speeds['hf-active']:7.0f}"
            " active  tok/s",
            flush=True,
        )
        peers = {name: speed for name, speed in speeds.items() if name.startswith("llama.cpp")}
        if peers:
            told = "  ".join(f"{name} {speed:.0f}" for name, speed in peers.items())
            ratios = "  ".join(f"{side} {speeds[side] / max(peers.values()):.2f}x" for side in sides)
            print(f"{'':20}{task:13} {told} tok/s: {ratios}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an end from outside ends the sides too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama32m", "default"], help="llama32m, default, or a folder")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--sides", nargs="+", default=["jax"], help="jax, torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-python", default="", help="python of an environment that has llama_cpp and gguf")
    args = parser.parse_args()
    if "int8" in args.dtypes and args.models != ["llama32m"]:
        parser.error("--dtypes int8 rounds the weights of llama32m; give --models llama32m")
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            path = DEFAULT_MODEL if model == "default" else Path(model)
            if model == "llama32m":
                path = Path(scratch) / model
                if not path.exists():
                    write_llama32m(path)
            for dtype in args.dtypes:
                report(model, dtype, compare(path, dtype, args), args.sides)


if __name__ == "__main__":
    main()
