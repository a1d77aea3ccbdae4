"""numpy reference == transformers, float32, on tiny random checkpoints of every family and every kind of rope.

Sequences are longer than every window and than the original length of the scaled ropes. The bound is the project's:
the largest difference of any log-probability at any position is at most 1e-4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.checkpoints import FAMILIES, ROPES, write_checkpoint
from tests.reference.decoder import decode, log_softmax, reference_params

BOUND = 1e-4
LENGTH = 96

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((f"{family}", family, {}) for family in FAMILIES),
    *((f"llama-{kind}", "llama", {"rope_parameters": rope}) for kind, rope in ROPES.items()),
    *((f"qwen3-{kind}", "qwen3", {"rope_parameters": ROPES[kind]}) for kind in ("yarn", "dynamic")),
    ("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama-gelu", "llama", {"hidden_act": "gelu"}),
    ("llama-head-dim", "llama", {"head_dim": 24, "num_key_value_heads": 1}),
    ("llama-dynamic-grown", "llama", {"rope_parameters": ROPES["dynamic"], "max_position_embeddings": 64}),
    ("llama-yarn-mscale", "llama", {"rope_parameters": {**ROPES["yarn"], "mscale": 1.2, "mscale_all_dim": 0.8}}),
    ("llama-yarn-plain", "llama", {"rope_parameters": {**ROPES["yarn"], "truncate": False, "attention_factor": 1.3}}),
    ("qwen2-types", "qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    (
        "gemma3-linear",
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {**ROPES["linear"], "rope_theta": 1e6},
                "sliding_attention": ROPES["default"],
            },
            "final_logit_softcapping": 20.0,
        },
    ),
    ("gemma2-no-caps", "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("phi3-longrope", "phi3", {"rope_parameters": ROPES["longrope"], "original_max_position_embeddings": 64}),
    (
        "phi3-partial",
        "phi3",
        {
            "rope_parameters": {
                **ROPES["longrope"],
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(6)],
                "long_factor": [1.0 + 0.6 * i for i in range(6)],
            },
            "original_max_position_embeddings": 64,
        },
    ),
]


@pytest.mark.parametrize(("family", "overrides"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_reference_equals_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path, **overrides)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = np.random.default_rng(7).integers(3, 320, LENGTH)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].float().numpy()
    arch, params = reference_params(tmp_path)
    ours = decode(arch, params, ids)
    difference = np.abs(log_softmax(ours) - log_softmax(theirs)).max()
    assert difference <= BOUND


def test_short_longrope_uses_short_factors(tmp_path: Path) -> None:
    """A served length within the original one must take the other list: transformers does so for short sequences."""
    write_checkpoint("phi3", tmp_path, rope_parameters=ROPES["longrope"], original_max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = np.random.default_rng(8).integers(3, 320, 60)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].float().numpy()
    arch, params = reference_params(tmp_path)
    assert np.abs(log_softmax(decode(arch, params, ids, 64)) - log_softmax(theirs)).max() <= BOUND
    assert np.abs(log_softmax(decode(arch, params, ids, 65)) - log_softmax(theirs)).max() > BOUND
