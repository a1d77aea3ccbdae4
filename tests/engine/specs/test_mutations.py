"""Damaged and mismatched checkpoints: every one is refused with an error that names the file and the tensor or field.

A case is (name, what to do, pattern of the message). A change to the Draft is made before writing, a change to the
folder after it. `test_undamaged` keeps the cases honest: the same checkpoint without damage loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import CheckpointError, ConfigError
from engine.specs.checkpoint import INDEX_NAME
from tests.engine.specs.damage import FILE, Draft, Tensor, array, header_of, load, pack

Before = Callable[[Draft], object]
After = Callable[[Path], object]
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Q, K, GATE = (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"))
BIAS = "model.layers.0.self_attn.q_proj.bias"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_undamaged(tmp_path: Path) -> None:
    assert load(Draft(tmp_path).write()) == 21


def test_undamaged_shards(tmp_path: Path) -> None:
    assert load(Draft(tmp_path, num_shards=3).write()) == 21


def refused(folder: Path, kind: type[Exception], *patterns: str) -> None:
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message


# --- one file cut short or long ---


def boundaries(draft: Draft) -> dict[str, int]:
    """Offsets in the file where something begins, by name."""
    data = pack(draft.tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    marks = {"length": 8, "header": start, "file": len(data)}
    for name in (EMBED, K, NORM):
        marks[name] = start + header_of(draft.tensors)[name]["data_offsets"][1]
    return marks


MARKS = [(mark, shift) for mark in ("length", "header", EMBED, K, NORM) for shift in (-1, 0, 1)]


@pytest.mark.parametrize(("mark", "shift"), [*MARKS, ("file", -1), ("file", 1)])
def test_cut_at_boundary(tmp_path: Path, mark: str, shift: int) -> None:
    draft = Draft(tmp_path)
    at = boundaries(draft)[mark] + shift
    file = draft.write() / FILE
    data = file.read_bytes()
    file.write_bytes((data + b"\0" * 8)[:at])
    refused(tmp_path, CheckpointError, FILE)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_almost_empty(tmp_path: Path, size: int) -> None:
    file = Draft(tmp_path).write() / FILE
    file.write_bytes(file.read_bytes()[:size])
    refused(tmp_path, CheckpointError, FILE, "too few")


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 100_000_001, -8, 8])
def test_wrong_header_length(tmp_path: Path, length: int) -> None:
    """Negative and 8: relative to the right length."""
    file = Draft(tmp_path).write() / FILE
    data = file.read_bytes()
    length = length + int.from_bytes(data[:8], "little") if length in (-8, 8) else length
    file.write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(tmp_path, CheckpointError, FILE)


@pytest.mark.parametrize("nth", range(40))
def test_flipped_header_bit(tmp_path: Path, nth: int) -> None:
    file = Draft(tmp_path).write() / FILE
    data = bytearray(file.read_bytes())
    text_end = 8 + len(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]).rstrip())
    at = 8 + (text_end - 9) * nth // 39  # from the opening to the closing brace
    data[at] ^= 1 << (nth % 7)
    file.write_bytes(bytes(data))
    refused(tmp_path, CheckpointError, FILE)


# --- the header lies ---


def entry(**changes: Any) -> Callable[[Draft], dict[str, Any]]:
    """A header in which the entry of K is changed."""

    def make(draft: Draft) -> dict[str, Any]:
        header = header_of(draft.tensors)
        header[K] = {**header[K], **changes}
        return {name: value for name, value in header.items() if value}

    return make


def shifted(start: int, stop: int) -> Callable[[Draft], dict[str, Any]]:
    def make(draft: Draft) -> dict[str, Any]:
        header = header_of(draft.tensors)
        low, high = header[K]["data_offsets"]
        header[K]["data_offsets"] = [low + start, high + stop]
        return header

    return make


def without_key(draft: Draft) -> dict[str, Any]:
    header = header_of(draft.tensors)
    del header[K]["dtype"]
    return header


def swapped_offsets(draft: Draft) -> dict[str, Any]:
    header = header_of(draft.tensors)
    header[K]["data_offsets"].reverse()
    return header


def same_range(draft: Draft) -> dict[str, Any]:
    header = header_of(draft.tensors)
    other = "model.layers.1.self_attn.v_proj.weight"
    header[other]["data_offsets"] = header[K]["data_offsets"]
    return header


def doubled(draft: Draft) -> bytes:
    text = json.dumps(header_of(draft.tensors))
    return (text[:-1] + ", " + json.dumps({K: header_of(draft.tensors)[K]})[1:]).encode()


HEADERS: list[tuple[str, Callable[[Draft], Any], str]] = [
    ("unknown dtype", entry(dtype="F31"), f"{K}: dtype 'F31'"),
    ("dtype not text", entry(dtype=3), f"{K}: dtype 3"),
    ("dtype of another size", entry(dtype="F64"), f"{K}: F64 .* takes"),
    ("integers of that size", entry(dtype="I32"), f"{K}: dtype I32 is not supported"),
    ("shape of another size", entry(shape=[8, 9]), rf"{K}: F32 \[8, 9\] takes 288"),
    ("transposed shape", entry(shape=[4, 16]), rf"{K}: shape \[4, 16\], config.json means \[8, 8\]"),
    ("shape flattened", entry(shape=[64]), rf"{K}: shape \[64\]"),
    ("negative shape", entry(shape=[-8, -8]), f"{K}: shape"),
    ("shape with a fraction", entry(shape=[8, 8.0]), f"{K}: shape"),
    ("shape with true", entry(shape=[True, 64]), f"{K}: shape"),
    ("shape that overflows 64 bits", entry(shape=[2**62, 16, 4]), f"{K}: F32 .* takes {2**70} bytes"),
    ("shape of 2^64 + 64", entry(shape=[2**64 + 64]), f"{K}: F32"),
    ("zero rows", entry(shape=[0, 8]), f"{K}: F32 .* takes 0"),
    ("one offset", entry(data_offsets=[0]), f"{K}: data_offsets"),
    ("negative offset", entry(data_offsets=[-256, 0]), f"{K}: data_offsets"),
    ("offsets as text", entry(data_offsets=["0", "256"]), f"{K}: data_offsets"),
    ("offsets reversed", swapped_offsets, f"{K}: F32"),
    ("offsets past the end", shifted(2**40, 2**40), f"{K}: starts|starts at byte"),
    ("gap before", shifted(4, 4), f"{K}: starts at byte .*gap"),
    ("overlap", shifted(-4, -4), f"{K}: starts at byte .*overlaps"),
    ("two tensors on one range", same_range, "overlaps"),
    ("key missing", without_key, f"{K}: the header entry"),
    ("key too many", entry(strides=[8, 1]), f"{K}: the header entry"),
    ("entry is a list", lambda draft: {**header_of(draft.tensors), K: [1]}, f"{K}: the header entry"),
    ("name twice", doubled, f"{K}' appears twice"),
    ("metadata not strings", lambda draft: {"__metadata__": {"format": 1}, **header_of(draft.tensors)}, "__metadata__"),
    ("a list", lambda draft: b"[1, 2]", "does not start with"),
    ("leading space", lambda draft: b" " + json.dumps(header_of(draft.tensors)).encode(), "does not start with"),
    ("not UTF-8", lambda draft: b'{"\xff": 1}', "not valid JSON"),
    ("name with control characters", lambda d: {"a\n\x1b[2J": [1]}, r"a\\n\\x1b\[2J: the header entry"),
    ("nested a million deep", lambda draft: b'{"a":' + b"[" * 1_000_000, "nested too deeply|not valid JSON"),
    ("a number of 10,000 digits", lambda draft: b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
    ("NaN", lambda draft: b'{"a": NaN}', "NaN is not JSON"),
]


@pytest.mark.parametrize(("header", "pattern"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS])
def test_lying_header(tmp_path: Path, header: Callable[[Draft], Any], pattern: str) -> None:
    draft = Draft(tmp_path)
    file = draft.write() / FILE
    file.write_bytes(pack(draft.tensors, header(draft)))
    refused(tmp_path, CheckpointError, FILE, pattern)


# --- the tensors are not those of config.json ---


def spoiled(name: str, value: float, dtype: str = "F32") -> Before:
    def change(draft: Draft) -> None:
        numbers = np.frombuffer(draft.tensors[name].data, "<f4").reshape(draft.tensors[name].shape).copy()
        numbers.reshape(-1)[-1] = value
        draft.tensors[name] = array(numbers, dtype)

    return change


def bfloat16_nan(draft: Draft) -> None:
    draft.config["torch_dtype"] = "bfloat16"
    draft.tensors[NORM] = array(np.full(8, 0x7FC0), "BF16")


def half_for_bfloat16(draft: Draft) -> None:
    draft.config["torch_dtype"] = "bfloat16"
    draft.tensors[NORM] = array(np.ones(8), "F16")


def tied_with_another_head(draft: Draft) -> None:
    draft.config["tie_word_embeddings"] = True


def tied_with_short_head(draft: Draft) -> None:
    draft.config["tie_word_embeddings"] = True
    draft.tensors[HEAD] = array(np.ones((23, 8)))


TENSORS: list[tuple[str, Before, str]] = [
    ("missing", lambda d: d.tensors.pop(K), f"{K}: missing"),
    ("missing head", lambda d: d.tensors.pop(HEAD), f"{HEAD}: missing"),
    ("renamed", lambda d: d.tensors.update({K + "x": d.tensors.pop(K)}), f"{K}: missing"),
    ("extra", lambda d: d.tensors.update(extra=array(np.ones(3))), "extra: not a parameter of llama"),
    ("extra layer", lambda d: d.tensors.update({K.replace("1", "2"): d.tensors[K]}), "layers.2.*not a parameter"),
    ("extra bias", lambda d: d.tensors.update({BIAS: array(np.ones(16))}), f"{BIAS}: not a parameter"),
    (
        "twice under two prefixes",
        lambda d: d.tensors.update({"norm.weight": d.tensors[NORM]}),
        "^[^:]*: norm.weight: not",
    ),
    ("NaN", spoiled(Q, np.nan), f"{Q}: NaN or infinity at element 127"),
    ("infinity", spoiled(EMBED, np.inf), f"{EMBED}: NaN or infinity"),
    ("minus infinity", spoiled(NORM, -np.inf), f"{NORM}: NaN or infinity"),
    ("overflow in float16", spoiled(GATE, np.inf, "F16"), f"{GATE}: NaN or infinity"),
    ("NaN in bfloat16", bfloat16_nan, f"{NORM}: NaN or infinity"),
    ("float16 where bfloat16 is said", half_for_bfloat16, f"{NORM}: dtype F16, config.json says bfloat16"),
    ("float64", lambda d: d.tensors.update({NORM: array(np.ones(8), "F64")}), f"{NORM}: dtype F64"),
    ("bytes", lambda d: d.tensors.update({NORM: array(np.ones(8), "U8")}), f"{NORM}: dtype U8"),
    ("short norm", lambda d: d.tensors.update({NORM: array(np.ones(7))}), rf"{NORM}: shape \[7\]"),
    ("scalar norm", lambda d: d.tensors.update({NORM: Tensor("F32", [], b"\0\0\0\0")}), rf"{NORM}: shape \[\]"),
    ("tied, but the head differs", tied_with_another_head, f"{HEAD}: differs from {EMBED}"),
    ("tied, but the head is short", tied_with_short_head, f"{HEAD}: tied to {EMBED} but of another shape"),
]


@pytest.mark.parametrize(("change", "pattern"), [case[1:] for case in TENSORS], ids=[case[0] for case in TENSORS])
def test_wrong_tensors(tmp_path: Path, change: Before, pattern: str) -> None:
    draft = Draft(tmp_path)
    change(draft)
    refused(draft.write(), CheckpointError, pattern)


# --- shards and their index ---


def edit_index(change: Callable[[dict[str, Any]], object]) -> After:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        change(index)
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return edit


def swap_shards(folder: Path) -> None:
    (folder / FIRST).rename(folder / "aside")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "aside").rename(folder / SECOND)


def index_name_twice(folder: Path) -> None:
    text = (folder / INDEX_NAME).read_text()
    (folder / INDEX_NAME).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{K}": "{FIRST}", ', 1))


def copy_shard(name: str) -> After:
    return lambda folder: (folder / name).write_bytes((folder / FIRST).read_bytes())


def cut_shard(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])


SHARDS: list[tuple[str, After, str]] = [
    ("missing shard", lambda f: (f / SECOND).unlink(), f"{SECOND}: missing"),
    ("extra shard", copy_shard("model-00003-of-00003.safetensors"), "model-00003.*not listed"),
    ("whole model beside the shards", copy_shard(FILE), f"{FILE}: not listed"),
    ("second copy", copy_shard(SECOND), f"{SECOND}: .*(is not in it|not listed)"),
    ("swapped", swap_shards, f"{FIRST}: .*(is not in it|not listed)"),
    ("cut", cut_shard, f"{SECOND}: the data ends"),
    ("empty shard", lambda f: (f / SECOND).write_bytes(b""), f"{SECOND}: 0 bytes"),
    ("index is a folder's only guide", lambda f: (f / INDEX_NAME).unlink(), "2 safetensors files .* and no model"),
    ("tensor not listed", edit_index(lambda i: i["weight_map"].pop(K)), f"{SECOND}: {K}: is not listed"),
    ("listed and absent", edit_index(lambda i: i["weight_map"].update(ghost=FIRST)), f"{FIRST}: ghost: is listed"),
    ("listed in the other", edit_index(lambda i: i["weight_map"].update({K: FIRST})), f"{FIRST}: {K}: is listed"),
    ("no weight_map", edit_index(lambda i: i.pop("weight_map")), f"{INDEX_NAME}: weight_map"),
    ("empty weight_map", edit_index(lambda i: i.update(weight_map={})), f"{INDEX_NAME}: weight_map"),
    ("weight_map is a list", edit_index(lambda i: i.update(weight_map=[K])), f"{INDEX_NAME}: weight_map"),
    ("a number for a shard", edit_index(lambda i: i["weight_map"].update({K: 1})), f"{INDEX_NAME}: {K}: 1 is not"),
    ("path", edit_index(lambda i: i["weight_map"].update({K: "../x.safetensors"})), f"{INDEX_NAME}: {K}: '../x"),
    ("pickle", edit_index(lambda i: i["weight_map"].update({K: "model.bin"})), f"{INDEX_NAME}: {K}: 'model.bin'"),
    ("name twice", index_name_twice, f"{INDEX_NAME}: .*appears twice"),
    ("index cut", lambda f: (f / INDEX_NAME).write_text('{"weight_map": {'), f"{INDEX_NAME}: not valid JSON"),
    ("index empty", lambda f: (f / INDEX_NAME).write_text(""), f"{INDEX_NAME}: not valid JSON"),
]


@pytest.mark.parametrize(("change", "pattern"), [case[1:] for case in SHARDS], ids=[case[0] for case in SHARDS])
def test_wrong_shards(tmp_path: Path, change: After, pattern: str) -> None:
    change(Draft(tmp_path, num_shards=2).write())
    refused(tmp_path, CheckpointError, pattern)


# --- files that are not there or of another kind ---


def only(name: str) -> After:
    return lambda folder: (folder / FILE).rename(folder / name)


FILES: list[tuple[str, After, str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "config.json: not found"),
    ("config cut", lambda f: (f / "config.json").write_text('{"model_type": "lla'), "config.json: not valid JSON"),
    ("config empty", lambda f: (f / "config.json").write_bytes(b""), "config.json: not valid JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), "config.json: the JSON is not an object"),
    ("config name twice", lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "'a' appears twice"),
    ("config with NaN", lambda f: (f / "config.json").write_text('{"rms_norm_eps": NaN}'), "config.json: NaN"),
    ("config not UTF-8", lambda f: (f / "config.json").write_bytes(b'{"\xff": 1}'), "config.json: not valid JSON"),
    ("generation config cut", lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json: not"),
    ("nothing", lambda f: (f / FILE).unlink(), r"no \*\.safetensors in it"),
    ("pickle alone", only("pytorch_model.bin"), r"PyTorch pickles.*save_pretrained"),
    (".pt alone", only("model.pt"), r"PyTorch pickles \(\*\.pt\)"),
    ("GGUF alone", only("model.gguf"), r"GGUF .*convert"),
    ("Mistral's own names", only("consolidated.safetensors"), "only consolidated.safetensors"),
    ("one part of two", only(FIRST), "and no model.safetensors.index.json"),
]


@pytest.mark.parametrize(("change", "pattern"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_wrong_files(tmp_path: Path, change: After, pattern: str) -> None:
    change(Draft(tmp_path).write())
    refused(tmp_path, CheckpointError, pattern)


# --- config.json says something else ---

ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt5"}, "model_type: 'gpt5' .*gemma2.*llama.*qwen3"),
    ({"model_type": None}, "model_type: None .*llama"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: .*LlamaForCausalLM"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"hidden_size": None}, "hidden_size: None .*integer"),
    ({"hidden_size": 0}, "hidden_size: 0"),
    ({"hidden_size": "8"}, "hidden_size: '8'"),
    ({"hidden_size": True}, "hidden_size: True"),
    ({"hidden_size": 8.5}, "hidden_size: 8.5"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": 10, "head_dim": None}, "num_attention_heads: 4 .*divisor of hidden_size = 10"),
    ({"num_attention_heads": 3}, "num_key_value_heads: 2 .*divisor of num_attention_heads = 3"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: 3 .*divisor"),
    ({"num_key_value_heads": -2}, "num_key_value_heads: -2"),
    ({"head_dim": 5}, "head_dim: 5 .*even rotary size"),
    ({"head_dim": 0}, "head_dim: 0"),
    ({"vocab_size": 0}, "vocab_size: 0"),
    ({"vocab_size": "24"}, "vocab_size: '24'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"max_position_embeddings": None}, "max_position_embeddings: None"),
    ({"max_position_embeddings": -1}, "max_position_embeddings: -1"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps: 0.0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: '1e-5'"),
    ({"hidden_act": "relu"}, "hidden_act: 'relu' .*silu"),
    ({"hidden_act": {"a": 1}}, "hidden_act"),
    ({"attention_bias": "false"}, "attention_bias: 'false' .*true or false"),
    ({"mlp_bias": 1}, "mlp_bias: 1"),
    ({"torch_dtype": "int8"}, "torch_dtype: 'int8' .*bfloat16"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
    ({"dtype": "bfloat16"}, "torch_dtype: 'float32' .*the same as dtype = bfloat16"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'"),
    ({"eos_token_id": 24}, "eos_token_id: 24 .*23"),
    ({"eos_token_id": -1}, "eos_token_id: -1"),
    ({"eos_token_id": "2"}, "eos_token_id: '2'"),
    ({"eos_token_id": [2, 99]}, r"eos_token_id: \[2, 99\]"),
    ({"bos_token_id": 1.5}, "bos_token_id: 1.5"),
    ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config: quant_method: 'hqq' .*gptq"),
    ({"quantization_config": "gptq"}, "quantization_config: 'gptq' .*an object"),
    ({"sliding_window": 32}, "sliding_window: 32 .*Mistral"),
    ({"layer_types": ["full_attention"]}, "layer_types: .*num_hidden_layers = 2"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window: is missing"),
    ({"num_local_experts": 8}, "num_local_experts: 8"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
    ({"rope_theta": 0}, "rope_theta: 0"),
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"rope_scaling": "linear"}, "rope_scaling: 'linear' .*object"),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling: type: 'ntk' .*llama3"),
    ({"rope_scaling": {"rope_type": "llama3", "type": "linear", "factor": 2.0}}, "rope_scaling: type: 'linear'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling: factor: 0.5"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}}, "rope_scaling: beta_fast: 32 .*linear"),
    ({"rope_scaling": {"type": "default", "factor": 4.0}}, "rope_scaling: factor: 4.0"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: high_freq_factor"),
    ({"rope_scaling": {**ROPE, "mrope_section": [1]}}, "rope_scaling: mrope_section"),
    ({"rope_scaling": {**ROPE, "rope_theta": 5000.0}}, "rope_theta: 10000.0 .*5000"),
    ({"rope_scaling": {**LONG, "long_factor": [2.0]}}, "rope_scaling: long_factor: .*list of 2 numbers"),
    ({"rope_scaling": {**LONG, "short_factor": [1.0, -1.0]}}, "rope_scaling: short_factor"),
    ({"rope_scaling": ROPE, "rope_parameters": LONG}, "rope_scaling: .*null where rope_parameters"),
    ({"rope_scaling": ROPE, "original_max_position_embeddings": 32}, "original_max_position_embeddings: 16 .*32"),
    ({"rope_parameters": {"full_attention": {}, "other": {}}}, "rope_parameters: other"),
    ({"rope_parameters": {"rope_type": "default", "a\nb": 1}}, r"rope_parameters: a\\nb: 1"),
]


@pytest.mark.parametrize(("change", "pattern"), CONFIGS, ids=[json.dumps(case[0])[:60] for case in CONFIGS])
def test_wrong_config(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    draft = Draft(tmp_path)
    draft.config |= change
    refused(draft.write(), ConfigError, "config.json", pattern)


MISMATCHES: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 8}, r"q_proj.weight: shape \[16, 8\], config.json means \[32, 8\]"),
    ({"num_key_value_heads": 4}, r"k_proj.weight: shape \[8, 8\], config.json means \[16, 8\]"),
    ({"num_key_value_heads": None}, r"k_proj.weight: shape \[8, 8\], config.json means \[16, 8\]"),
    ({"head_dim": 8}, r"q_proj.weight: shape \[16, 8\], config.json means \[32, 8\]"),
    ({"vocab_size": 25}, rf"{EMBED}: shape \[24, 8\], config.json means \[25, 8\]"),
    ({"hidden_size": 16}, rf"{EMBED}: shape \[24, 8\], config.json means \[24, 16\]"),
    ({"intermediate_size": 16}, r"gate_proj.weight: shape \[12, 8\], config.json means \[16, 8\]"),
    ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight: missing"),
    ({"num_hidden_layers": 1}, r"model.layers.1.\S+: not a parameter of llama"),
    ({"attention_bias": True}, r"model.layers.0.self_attn.q_proj.bias: missing"),
    ({"mlp_bias": True}, r"model.layers.0.mlp.gate_proj.bias: missing"),
    ({"model_type": "qwen2", "architectures": None}, r"q_proj.bias: missing"),
    ({"model_type": "qwen3", "architectures": None}, r"q_norm.weight: missing"),
    ({"model_type": "phi3", "architectures": None}, r"qkv_proj.weight: missing"),
    ({"model_type": "gemma2", "architectures": None}, r"pre_feedforward_layernorm.weight: missing"),
]


@pytest.mark.parametrize(("change", "pattern"), MISMATCHES, ids=[json.dumps(case[0])[:60] for case in MISMATCHES])
def test_config_of_another_model(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    draft = Draft(tmp_path)
    draft.config |= change
    refused(draft.write(), CheckpointError, pattern)


GENERATIONS: list[tuple[dict[str, Any], str]] = [
    ({"eos_token_id": 24}, "eos_token_id: 24"),
    ({"eos_token_id": [2, -1]}, "eos_token_id"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"temperature": -1.0}, "temperature: "),
    ({"top_p": 1.5}, "top_p: "),
    ({"top_k": 1.5}, "top_k: "),
    ({"max_new_tokens": 0}, "max_new_tokens: "),
]


@pytest.mark.parametrize(("change", "pattern"), GENERATIONS, ids=[json.dumps(case[0]) for case in GENERATIONS])
def test_wrong_generation_config(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    draft = Draft(tmp_path)
    draft.generation |= change
    refused(draft.write(), ConfigError, "generation_config.json: " + pattern)
