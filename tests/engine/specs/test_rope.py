"""Frequencies of every kind of rope: transformers' to the last place, and fixed by the served length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.specs.arch import RopeSpec
from engine.specs.families import parse_config
from engine.specs.rope import frequencies
from tests.checkpoints import ROPES, family_config

# torch's vectorised pow is off by one unit in the last place in rare lanes; later steps multiply that.
MAX_ULP = {"default": 1, "linear": 1, "dynamic": 2, "llama3": 4, "yarn": 2, "longrope": 2}


def parsed(config: Any) -> RopeSpec:
    rope = parse_config(config.to_dict()).layers[0].mixer.rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("length", [48, 100, 4096])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("kind", [kind for kind in ROPES if kind != "default"])
def test_equal_to_transformers(kind: str, head_dim: int, length: int) -> None:
    params = dict(ROPES[kind])
    if kind == "longrope":
        params |= {name: [1.0 + 0.37 * i for i in range(head_dim // 2)] for name in ("short_factor", "long_factor")}
        params["long_factor"] = [2.0 * factor for factor in params["long_factor"]]
    config = family_config("llama", rope_parameters=params, head_dim=head_dim, max_position_embeddings=64)
    seq_len = torch.tensor(length) if kind == "dynamic" else length  # as its forward passes it
    theirs, scale = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=seq_len)
    ours, our_scale = frequencies(parsed(config), length)
    assert ours.dtype == np.float32 and our_scale == scale
    np.testing.assert_array_max_ulp(ours, theirs.numpy(), maxulp=MAX_ULP[kind])


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6, 123456.7])
@pytest.mark.parametrize("size", [16, 64, 96, 128])
def test_default_is_equal_to_transformers(theta: float, size: int) -> None:
    """The expression of every model's compute_default_rope_parameters."""
    theirs = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float) / size))
    ours, scale = frequencies(RopeSpec(theta=theta, rotary_size=size, max_position=64), 64)
    assert scale == 1.0
    np.testing.assert_array_max_ulp(ours, theirs.numpy(), maxulp=MAX_ULP["default"])


def test_longrope_and_dynamic_depend_on_the_served_length_alone() -> None:
    longrope = parsed(family_config("llama", rope_parameters=ROPES["longrope"], max_position_embeddings=256))
    assert np.array_equal(frequencies(longrope, 64)[0], frequencies(longrope, 1)[0])
    assert not np.array_equal(frequencies(longrope, 64)[0], frequencies(longrope, 65)[0])
    dynamic = parsed(family_config("llama", rope_parameters=ROPES["dynamic"], max_position_embeddings=64))
    assert np.array_equal(frequencies(dynamic, 64)[0], frequencies(dynamic, 1)[0])
    assert (frequencies(dynamic, 128)[0][1:] < frequencies(dynamic, 64)[0][1:]).all()


def test_given_attention_factors_win() -> None:
    for kind in ("yarn", "longrope"):
        config = family_config("llama", rope_parameters={**ROPES[kind], "attention_factor": 1.5})
        assert frequencies(parsed(config), 256)[1] == 1.5
