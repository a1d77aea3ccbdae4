"""config.json as published and as transformers 4 and 5 spell it: all spellings of a model give one ArchSpec.

The oracle is transformers itself: it reads the published (transformers 4) file and writes it back in its own spelling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.errors import ConfigError
from engine.specs.arch import ArchSpec
from engine.specs.cache import GroupKind, cache_groups
from engine.specs.families import PARSERS, parse_config
from engine.specs.weights import num_parameters
from tests.checkpoints import FAMILIES, ROPES, family_config

LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "vocab_size": 256000,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    },
    "Phi-3-mini-128k": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LONG,
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "phi3",
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LONG,
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 200064,
    },
}

# Parameters in the published model cards' safetensors metadata.
PARAMETERS = {
    "Llama-2-7b": 6_738_415_616,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b-it": 999_885_952,
    "Phi-3-mini-128k": 3_821_079_552,
    "Phi-4-mini": 3_836_021_760,
}


def rewritten(config: dict[str, Any]) -> dict[str, Any]:
    """The config as the installed transformers (5) reads and writes it."""
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    return dict(json.loads(theirs.to_json_string(use_diff=False)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_means_the_same_after_transformers_5(name: str) -> None:
    ours = parse_config(PUBLISHED[name])
    new = rewritten(PUBLISHED[name])
    assert "rope_theta" not in new and "torch_dtype" not in new  # it is another spelling indeed
    assert parse_config(new) == ours


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert num_parameters(parse_config(PUBLISHED[name])) == PARAMETERS[name]


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A transformers 5 config in the spelling of 4."""
    old = dict(config)
    rope = old.pop("rope_parameters")
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    share = scaling.pop("partial_rotary_factor", None)
    if share is not None:
        old["partial_rotary_factor"] = share
    old["rope_scaling"] = {"type": rope["rope_type"], **scaling} if rope["rope_type"] != "default" else None
    old["torch_dtype"] = old.pop("dtype")
    return old


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings(family: str) -> None:
    new = {**rewritten(family_config(family).to_dict()), "dtype": "bfloat16"}
    old = as_transformers_4(new)
    assert parse_config(old) == parse_config(new)
    assert parse_config(new).checkpoint_dtype == "bfloat16"


@pytest.mark.parametrize("kind", ROPES)
def test_both_spellings_of_rope(kind: str) -> None:
    new = {**rewritten(family_config("llama", rope_parameters=ROPES[kind]).to_dict()), "dtype": "float32"}
    arch = parse_config(new)
    assert parse_config(as_transformers_4(new)) == arch
    rope = arch.layers[0].mixer.rope
    assert rope is not None and rope.kind == kind and rope.theta == ROPES[kind]["rope_theta"]


def parsed(name: str, **changes: Any) -> ArchSpec:
    return parse_config({**PUBLISHED[name], **changes})


def windows(arch: ArchSpec) -> list[int | None]:
    return [layer.mixer.window for layer in arch.layers]


def test_windows_of_each_family() -> None:
    assert windows(parsed("Mistral-7B-v0.1")) == [4096] * 32
    assert windows(parsed("Mistral-7B-v0.1", sliding_window=None)) == [None] * 32
    assert windows(parsed("Mistral-7B-v0.1", sliding_window=32768)) == [None] * 32  # as long as the model: full
    assert windows(parsed("Qwen2.5-0.5B-Instruct")) == [None] * 24
    used = parsed("Qwen2.5-0.5B-Instruct", use_sliding_window=True, sliding_window=1024)
    assert windows(used) == [None] * 21 + [1024] * 3
    assert windows(parsed("gemma-2-2b")) == [4096, None] * 13
    assert windows(parsed("gemma-3-1b-it")) == ([512] * 5 + [None]) * 4 + [512, 512]
    assert windows(parsed("gemma-3-1b-it", sliding_window_pattern=2)) == [512, None] * 13
    assert windows(parsed("Phi-3-mini-128k")) == [None] * 32


def test_gemma3_has_two_ropes() -> None:
    arch = parsed("gemma-3-4b-it")
    local, full = arch.layers[0].mixer.rope, arch.layers[5].mixer.rope
    assert local is not None and (local.kind, local.theta) == ("default", 10_000.0)
    assert full is not None and (full.kind, full.theta, full.factor) == ("linear", 1_000_000.0, 8.0)
    assert arch.eos_token_ids == (1, 106) and arch.checkpoint_dtype == "bfloat16" and arch.vocab_size == 262208


def test_cache_groups() -> None:
    (only,) = cache_groups(parsed("Qwen3-0.6B"))
    assert (only.kind, only.layers, only.num_kv_heads, only.head_size) == (GroupKind.FULL, tuple(range(28)), 8, 128)
    assert only.bytes_per_token("bfloat16") == 2 * 28 * 8 * 128 * 2
    window, full = cache_groups(parsed("gemma-3-1b-it"))
    assert (window.kind, window.window, full.kind, full.window) == (GroupKind.WINDOW, 512, GroupKind.FULL, None)
    assert sorted(window.layers + full.layers) == list(range(26)) and full.layers == (5, 11, 17, 23)


def test_runs() -> None:
    assert [(first, len(period), times) for first, period, times in parsed("Qwen3-0.6B").runs] == [(0, 1, 28)]
    assert [(first, len(period), times) for first, period, times in parsed("gemma-2-2b").runs] == [(0, 2, 13)]


def test_served_lengths() -> None:
    """yarn counts from the original length; linear and dynamic state the length before scaling, as vLLM reads it."""
    assert parsed("Qwen3-0.6B").max_position == 131072
    assert parsed("Llama-3.2-1B").max_position == 131072
    assert parsed("Llama-2-7b", rope_scaling={"type": "linear", "factor": 4.0}).max_position == 16384
    assert parsed("Llama-2-7b", rope_scaling={"type": "dynamic", "factor": 2.0}).max_position == 8192
    assert parsed("gemma-3-4b-it").max_position == 131072


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Mistral-7B-v0.1", {"attention_bias": True}, "attention_bias: True"),
    ("Mistral-7B-v0.1", {"layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types: .*does not mix"),
    ("Qwen2.5-0.5B-Instruct", {"attention_bias": False}, "attention_bias: False"),
    ("Qwen2.5-0.5B-Instruct", {"use_sliding_window": 1}, "use_sliding_window: 1"),
    ("gemma-2-2b", {"hidden_activation": "relu"}, "hidden_activation: 'relu'"),
    ("gemma-2-2b", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: 0.0"),
    ("gemma-2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0"),
    ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
    ("gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
    ("gemma-3-1b-it", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters: .*sliding_attention"),
    ("gemma-3-4b-it", {"text_config": None}, "text_config: None"),
    ("gemma-3-4b-it", {"text_config": {"hidden_size": "x"}}, "text_config: hidden_size: 'x'"),
    ("Phi-3-mini-128k", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: .*longrope"),
    ("Phi-3-mini-128k", {"mlp_bias": True}, "mlp_bias: True"),
    ("Phi-4-mini", {"lm_head_bias": True}, "lm_head_bias: True"),
    ("Phi-4-mini", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5"),
]


@pytest.mark.parametrize(("name", "change", "pattern"), REFUSED, ids=[f"{r[0]}-{next(iter(r[1]))}" for r in REFUSED])
def test_refused_by_name(name: str, change: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        parsed(name, **change)


def test_unknown_model_type_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"model_type": "mamba"})
    assert all(name in str(caught.value) for name in PARSERS)


def test_own_code_is_never_read(tmp_path: Path) -> None:
    """auto_map is a pointer to code; it is ignored, so a file that it names is not even opened."""
    arch = parsed("Phi-3-mini-128k", auto_map={"AutoConfig": str(tmp_path / "evil.py")})
    assert arch == parsed("Phi-3-mini-128k")
