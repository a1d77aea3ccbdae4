"""numpy reference == transformers, float32, on tiny random checkpoints of every family and every kind of rope.

Sequences are longer than every window and than the original length of the scaled ropes. The bound is the project's:
the largest difference of any log-probability at any position is at most 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.specs.arch import ArchSpec
from tests.checkpoints import FAMILIES, ROPES, family_config, write_checkpoint
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


def test_text_part_of_gemma3_with_vision(tmp_path: Path) -> None:
    """The composite model of transformers, fed text alone, against the text part that is read out of its files."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=family_config("gemma3").to_dict(),
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **vision},
        mm_tokens_per_image=4,
        image_token_index=300,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(9).integers(3, 300, LENGTH)
    with torch.no_grad():
        theirs = (
            model(torch.tensor(ids)[None], attention_mask=torch.ones(1, LENGTH, dtype=torch.long)).logits[0].numpy()
        )
    arch, params = reference_params(tmp_path)
    assert np.abs(log_softmax(decode(arch, params, ids)) - log_softmax(theirs)).max() <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_matters(family: str, tmp_path: Path) -> None:
    """The checkpoints can tell: each parameter, the window, the rope and each cap moves log-probabilities visibly."""
    arch, params = reference_params(write_checkpoint(family, tmp_path))
    ids = np.random.default_rng(7).integers(3, 320, LENGTH)
    right = log_softmax(decode(arch, params, ids))

    def moved(arch: ArchSpec, params: dict[str, Any]) -> float:
        return float(np.abs(log_softmax(decode(arch, params, ids)) - right).max())

    for name, value in params.items():
        assert moved(arch, {**params, name: value + 0.1 * np.roll(value, 1, axis=0)}) > 100 * BOUND, name
    for change in changes_of(arch):
        assert moved(change, params) > 100 * BOUND
    assert sum(1 for _ in changes_of(arch)) >= 2


def changes_of(arch: ArchSpec) -> Iterator[ArchSpec]:
    """The same architecture with one thing left out, in every layer that has it."""

    def with_mixers(**values: Any) -> ArchSpec:
        layers = (replace(layer, mixer=replace(layer.mixer, **values)) for layer in arch.layers)
        return replace(arch, layers=tuple(layers))

    yield with_mixers(rope=None)
    yield with_mixers(scale=0.9 * arch.layers[0].mixer.scale)
    if any(layer.mixer.window for layer in arch.layers):
        yield with_mixers(window=None)
    if any(layer.mixer.logit_cap for layer in arch.layers):
        yield with_mixers(logit_cap=None)
    if arch.logit_cap is not None:
        yield replace(arch, logit_cap=None)
    if arch.embedding_scale != 1:
        yield replace(arch, embedding_scale=1.0)
    if len({layer.mixer.rope for layer in arch.layers}) > 1:
        yield with_mixers(rope=arch.layers[0].mixer.rope)
