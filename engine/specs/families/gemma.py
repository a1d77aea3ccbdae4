"""Gemma 2 and 3: sandwich norms with weight + 1, scaled embeddings, windows in most layers.

Gemma 2 alternates windows and caps its logits; Gemma 3 has one full layer in six, norms on q and k, and another rope
base for the layers with a window. Of a Gemma 3 with vision the text part is read and the rest stays in the file.
"""

from __future__ import annotations

from typing import Literal

from engine.specs.arch import ArchSpec, RopeSpec, TensorNames
from engine.specs.families.dense import (
    Decoder,
    Shape,
    activation,
    attention,
    build,
    check_common,
    layer_windows,
    parse_shape,
)
from engine.specs.families.fields import Fields
from engine.specs.families.rope import parse_rope

GEMMA3_SIZES = {
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "num_hidden_layers": 26,
    "intermediate_size": 9216,
}


def gemma_decoder(
    config: Fields,
    *,
    family: Literal["gemma2", "gemma3"],
    shape: Shape,
    ropes: tuple[RopeSpec, RopeSpec],
    pattern: int,
    caps: tuple[float | None, float | None],
    names: TensorNames,
) -> ArchSpec:
    """Gemma 2 and 3: sandwich norms with weight + 1, scaled embeddings, windows in all but every `pattern`th layer.

    ropes: of full layers, of layers with a window. caps: on the attention logits, on the output logits.
    """
    scalar = config.number("query_pre_attn_scalar", 256.0)
    bias = config.boolean("attention_bias", False)
    window = config.integer("sliding_window", 4096)
    rule = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(shape.num_layers)]
    return build(
        config,
        Decoder(
            family=family,
            shape=shape,
            attention=attention(
                config,
                shape,
                ropes[0],
                scale=scalar**-0.5,
                logit_cap=caps[0],
                qk_norm=family == "gemma3",
                qkv_bias=bias,
                out_bias=bias,
            ),
            windows=layer_windows(config, shape.num_layers, window, rule),
            window_rope=ropes[1],
            max_position=config.integer("max_position_embeddings", minimum=2),
            activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
            norm_offset=1.0,
            sandwich=True,
            default_tied=True,
            embedding_scale=shape.hidden_size**0.5,
            logit_cap=caps[1],
            names=names,
        ),
    )


def soft_cap(config: Fields, name: str, default: float | None) -> float | None:
    """An explicit null switches a cap off; an absent key means the family's default."""
    return config.optional_number(name) if name in config.values else default


def parse_gemma2(config: Fields) -> ArchSpec:
    """Gemma 2: alternating windows and two soft caps."""
    check_common(config, "Gemma2ForCausalLM")
    config.neutral("mlp_bias", (False,), "this model_type has no such bias")
    shape = parse_shape(config, {"head_dim": 256})
    rope = parse_rope(config, head_size=shape.head_size)
    return gemma_decoder(
        config,
        family="gemma2",
        shape=shape,
        ropes=(rope, rope),
        pattern=2,
        caps=(soft_cap(config, "attn_logit_softcapping", 50.0), soft_cap(config, "final_logit_softcapping", 30.0)),
        names=TensorNames(),
    )


def parse_gemma3_text(config: Fields) -> ArchSpec:
    """Gemma 3, text only (the 1B, or any size saved as Gemma3ForCausalLM)."""
    check_common(config, "Gemma3ForCausalLM")
    return gemma3(config, TensorNames())


def parse_gemma3(config: Fields) -> ArchSpec:
    """The text part of a Gemma 3 with vision: its tensors for images are left in the file."""
    check_common(config, "Gemma3ForConditionalGeneration")
    text = config.table("text_config")
    if text is None:
        config.refuse("text_config", "an object")
    inherited = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "tie_word_embeddings")
    outer = {key: config.values[key] for key in inherited if config.has(key)}
    defaults = {"bos_token_id": 2, "eos_token_id": 1}  # what the published files leave out
    merged = Fields({**defaults, **text.values, **outer}, text.where)
    check_common(merged, "Gemma3ForCausalLM")
    names = TensorNames(
        prefixes=("model.language_model.", "language_model.model."),
        heads=("lm_head.weight", "language_model.lm_head.weight"),
        ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    )
    return gemma3(merged, names)


def gemma3(config: Fields, names: TensorNames) -> ArchSpec:
    config.neutral("attn_logit_softcapping", (), "Gemma 3 has no cap on attention logits")
    config.neutral("mlp_bias", (False,), "this model_type has no such bias")
    shape = parse_shape(config, {**GEMMA3_SIZES, "vocab_size": 262208})
    positions = Fields({"max_position_embeddings": 131072, **config.values}, config.where)
    nested = config.table("rope_parameters")
    if nested is not None and nested.values and not {"full_attention", "sliding_attention"} & set(nested.values):
        config.refuse("rope_parameters", "an object with full_attention and sliding_attention")
    rope = parse_rope(positions, head_size=shape.head_size, default_theta=1_000_000.0)
    local_theta = config.number("rope_local_base_freq", 10_000.0)
    if nested is not None and nested.values:
        local = parse_rope(
            positions, head_size=shape.head_size, layer_type="sliding_attention", default_theta=local_theta
        )
    else:
        local = RopeSpec(theta=local_theta, rotary_size=shape.head_size, max_position=rope.max_position)
    return gemma_decoder(
        positions,
        family="gemma3",
        shape=shape,
        ropes=(rope, local),
        pattern=config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6)),
        caps=(None, config.optional_number("final_logit_softcapping")),
        names=names,
    )
