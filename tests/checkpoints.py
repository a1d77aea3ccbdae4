"""Tiny random checkpoints of every family, written by transformers itself: the fixtures of model and loading tests.

`write_checkpoint("gemma2", folder)` saves config.json, generation_config.json and model.safetensors. Weights are wide
(initializer_range 0.2 and norms away from their start), so that attention, position and every norm matter: a test
that ignores one of them fails. Equal calls of one process are copied, not built again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

HALF = 8  # half of the rotary size at head size 16
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [1.0 + 0.7 * i for i in range(HALF)],
        "original_max_position_embeddings": 64,
    },
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 32,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 40, "original_max_position_embeddings": 256}),
}
"""family -> (prefix of the transformers classes, what differs from COMMON)."""


def family_config(family: str, **overrides: Any) -> transformers.PretrainedConfig:
    prefix, changes = FAMILIES[family]
    name = prefix + ("TextConfig" if family == "gemma3" else "Config")
    config: transformers.PretrainedConfig = getattr(transformers, name)(**{**COMMON, **changes, **overrides})
    return config


def write_checkpoint(
    family: str, folder: Path, *, seed: int = 0, dtype: str = "float32", tokenizer: bool = False, **overrides: Any
) -> Path:
    """Save a random checkpoint of `family` into `folder` and return it. overrides: fields of its config."""
    key = json.dumps([family, seed, dtype, overrides], sort_keys=True)
    shutil.copytree(built(key), folder, dirs_exist_ok=True)
    if tokenizer:
        write_tokenizer(folder)
    return folder


@cache
def session_folder() -> Path:
    """Where this process builds its checkpoints; removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="twinfer-checkpoints-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def built(key: str) -> Path:
    """Build the checkpoint of one key, once a process."""
    family, seed, dtype, overrides = json.loads(key)
    folder = session_folder() / f"{family}-{len(list(session_folder().iterdir()))}"
    make_model(family, seed=seed, dtype=dtype, **overrides).save_pretrained(folder)
    return folder


def make_model(family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> transformers.PreTrainedModel:
    """The random model itself, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    config = family_config(family, **overrides)
    model = getattr(transformers, FAMILIES[family][0] + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:  # around 1 for Llama's form, around 0 for Gemma's weight + 1
                values = values * 0.3 + (0.0 if family.startswith("gemma") else 1.0)
            else:
                values *= config.initializer_range
            parameter.copy_(values)
    return model.to(getattr(torch, dtype)).eval()


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 320 entries, trained on a module of the standard library, with a chat template."""
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text)
    return folder


@cache
def tokenizer_files() -> dict[str, str]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=COMMON["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(contextlib.__file__).read_text()], trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}
