"""Do lm-eval's loglikelihoods through our HTTP server equal transformers' on the same checkpoint?

    python bench/lm_eval_check.py --lm-eval /path/to/lm_eval [--model CHECKPOINT] [--backend jax|torch]

Starts `twinfer serve`, runs `lm_eval --model local-completions` on a local jsonl task (token-id prompts with echo and
logprobs), then scores the same (context, continuation) pairs with transformers in float32 and prints the largest
difference. Exit status 1 when it is above 1e-3. lm-eval lives in an environment of its own (extra `lm-eval[api]`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

# in place of this folder: bench/kernels.py is no library
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DEFAULT_MODEL = Path(__file__).parent.parent / "engine" / "data" / "default_model"

ROWS = [
    ("def add(a, b):\n    return", [" a + b", " None", " self.x"]),
    ("import os\nimport sys\n\ndef main(", ["):\n", "argv=None):\n", " 42 banana"]),
    ("class Stack:\n    def __init__(self):\n        self.items =", [" []", " {}", " 'one two three'"]),
    ("for i in range(10):\n    print(", ["i)", "'hello')", "x ** y ** z)"]),
    ("try:\n    value = int(text)\nexcept", [" ValueError:\n", " KeyError as error:\n", ":\n    pass"]),
    ("def test_open(self):\n    with open(", ["path) as f:\n", "support.TESTFN, 'wb') as f:\n", "1, 2, 3)"]),
]

TASK = """task: local_pairs
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_ready(url: str, server: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode}")
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    sys.exit("the server did not become ready")


def run_lm_eval(binary: str, model: Path, url: str, folder: Path) -> list[tuple[str, str, float]]:
    """(context, continuation, loglikelihood) of every pair, as lm-eval got them from the server."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"context": c, "choices": k}) + "\n" for c, k in ROWS))
    (folder / "local_pairs.yaml").write_text(TASK.format(data=data))
    args = f"model=m,base_url={url}/v1/completions,num_concurrent=4,tokenizer={model},tokenizer_backend=huggingface"
    command = [binary, "--model", "local-completions", "--model_args", args, "--tasks", "local_pairs"]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    (samples,) = (folder / "out").rglob("samples_local_pairs*.jsonl")
    found = []
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        for pair, answer in zip(row["arguments"].values(), row["filtered_resps"], strict=True):
            found.append((pair["arg_0"], pair["arg_1"], float(answer[0])))
    return found


def reference(model: Path, pairs: list[tuple[str, str, float]]) -> list[float]:
    """The same loglikelihoods from transformers, float32 on the CPU, tokenised as lm-eval does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scores = []
    for context, continuation, _ in pairs:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        whole = tokenizer.encode(context + continuation, add_special_tokens=False)
        prefix = tokenizer.encode(context, add_special_tokens=False)
        start = len(prefix)
        whole = prefix + whole[start:]  # lm-eval sends the context's own ids, also where the border would merge
        with torch.no_grad():
            logprobs = network(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        scores.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(start, len(whole))))
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", required=True, help="the lm_eval program")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--backend", default="jax")
    args = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "twinfer", "serve", str(args.model), "--port", str(port)]
    command += ["--backend", args.backend, "--dtype", "float32", "--served-model-name", "m"]
    server = subprocess.Popen(command)
    try:
        wait_ready(url, server)
        with tempfile.TemporaryDirectory() as folder:
            ours = run_lm_eval(args.lm_eval, args.model, url, Path(folder))
    finally:
        server.terminate()
        server.wait(30)
    theirs = reference(args.model, ours)
    worst = max(abs(pair[2] - score) for pair, score in zip(ours, theirs, strict=True))
    for (context, continuation, score), expected in zip(ours, theirs, strict=True):
        print(f"{score:12.5f} {expected:12.5f}  {context[-24:]!r} -> {continuation!r}")
    print(f"{len(ours)} pairs, largest difference {worst:.2e} nat")
    return 0 if worst <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
