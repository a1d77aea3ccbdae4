"""llama.cpp's side of bench/cpu.py: run by the python of an environment that has llama_cpp, gguf and numpy.

PYTHON -m bench.llama_cpp_side FOLDER f32|f16|bf16|q8_0

Writes the Llama checkpoint of FOLDER (float32) as GGUF, loads it, then answers {"decode": streams}, {"prefill": 1} with
tokens a second, and {"tokens": n} with the greedy tokens of one prompt. Streams are sequences of one batch, as its
server's slots are.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.prompts import OUTPUTS, PREFILL, PROMPT, prompts

SLOTS = 8
CONTEXT = SLOTS * 1152  # each its part
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    raw = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, told in json.loads(raw[8:begin]).items():
        if name != "__metadata__":
            first, last = told["data_offsets"]
            found[name] = np.frombuffer(raw[begin + first : begin + last], np.float32).reshape(told["shape"])
    return found


def write_gguf(folder: Path, kind: str, target: Path) -> None:
    import gguf

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    types = gguf.GGMLQuantizationType
    wanted = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[kind]
    for name, numbers in tensors(folder).items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, index, part = stem.split(".", 3)
            ours = f"blk.{index}.{LAYER[part]}.weight"
        else:
            ours = f"{WHOLE[stem]}.weight"
        for part, heads in (("attn_q.", "num_attention_heads"), ("attn_k.", "num_key_value_heads")):
            if part in ours:  # its rope turns neighbours
                split = numbers.reshape(config[heads], 2, config["head_dim"] // 2, -1)
                numbers = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(numbers.shape)
        if numbers.ndim == 1 or kind == "f32":
            writer.add_tensor(ours, np.ascontiguousarray(numbers, np.float32))
        else:
            writer.add_tensor(ours, gguf.quants.quantize(numbers, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, CONTEXT, 1024, SLOTS
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = self.lib.llama_init_from_model(self.model, params)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.batch = self.lib.llama_batch_init(CONTEXT, 0, 1)

    def run(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """One call; (token, position, sequence, wants logits) -> the likeliest ids of those that want."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, (token, position, sequence, wants) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = sequence, wants
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        found = []
        for index, token in enumerate(tokens):
            if token[3]:
                logits = self.lib.llama_get_logits_ith(self.context, index)
                found.append(int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()))
        return found

    def begin(self, ids: np.ndarray) -> list[int]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        length = ids.shape[1]
        return self.run(
            [(int(t), at, row, at == length - 1) for row, row_ids in enumerate(ids) for at, t in enumerate(row_ids)]
        )

    def steps(self, ids: np.ndarray, count: int) -> tuple[float, list[list[int]]]:
        """Seconds of `count` decode steps, and all rows' tokens."""
        last = self.begin(ids)
        every = [last]
        start = time.perf_counter()
        for step in range(count):
            last = self.run([(token, ids.shape[1] + step, row, True) for row, token in enumerate(last)])
            every.append(last)
        return time.perf_counter() - start, every

    def decode(self, streams: int) -> float:
        return streams * OUTPUTS / self.steps(prompts(streams, PROMPT, self.vocab_size), OUTPUTS)[0]

    def prefill(self) -> float:
        ids = prompts(1, PREFILL, self.vocab_size)
        start = time.perf_counter()
        self.begin(ids)
        return PREFILL / (time.perf_counter() - start)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library's own words
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model.gguf"
        write_gguf(Path(sys.argv[1]), sys.argv[2], target)
        import llama_cpp

        quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        model = Llama(target)
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            task = json.loads(line)
            if "tokens" in task:
                ids = prompts(1, PROMPT, model.vocab_size)
                told: Any = [row[0] for row in model.steps(ids, task["tokens"])[1]]
            else:
                told = model.decode(task["decode"]) if "decode" in task else model.prefill()
            print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
