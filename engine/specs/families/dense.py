"""Dense decoders: Llama, Mistral, Qwen 2 and 3, Phi-3 and Phi-4, and what all dense families share.

Each `parse_*` reads what differs in its family and hands it to `decoder`. Defaults are those of transformers for keys
that real configs leave out; sizes that every config states are required. Anything that would change the mathematics
and is not known to the family is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from engine.specs.arch import Activation, ArchSpec, Attention, GatedFfn, LayerSpec, Norms, RopeSpec, TensorNames
from engine.specs.families.fields import Fields
from engine.specs.families.rope import parse_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
DTYPES = {name: name for name in ("float32", "bfloat16", "float16")} | {
    f"torch.{name}": name for name in ("float32", "bfloat16", "float16")
}

# Keys that change the mathematics and that no dense family here knows, with the values that mean "not used".
FOREIGN_KEYS: dict[str, tuple[object, ...]] = {
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "kv_lora_rank": (),
    "clip_qkv": (),
    "no_rope_layers": ([],),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "residual_multiplier": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "attention_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "rope_interleaved": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    "parallel_attn": (False,),
    "num_nextn_predict_layers": (0,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and head counts, common to all dense families."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int


def parse_shape(config: Fields, defaults: dict[str, int] | None = None) -> Shape:
    """Read and cross-check the sizes. defaults: for families whose published configs leave sizes out (Gemma 3)."""
    known = defaults or {}
    hidden = config.integer("hidden_size", known.get("hidden_size"))
    heads = config.integer("num_attention_heads", known.get("num_attention_heads"))
    kv_heads = config.integer("num_key_value_heads", known.get("num_key_value_heads", heads))
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    head_size = config.optional_integer("head_dim") or known.get("head_dim")
    if head_size is None:
        if hidden % heads:
            config.refuse("num_attention_heads", f"a divisor of hidden_size = {hidden}, as head_dim is not given")
        head_size = hidden // heads
    return Shape(
        hidden_size=hidden,
        vocab_size=config.integer("vocab_size", known.get("vocab_size")),
        num_layers=config.integer("num_hidden_layers", known.get("num_hidden_layers"), maximum=4096),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        ffn_size=config.integer("intermediate_size", known.get("intermediate_size")),
    )


def checkpoint_dtype(config: Fields) -> str:
    """ "dtype" (transformers 5) or "torch_dtype" (4); both must agree."""
    names = ("dtype", "torch_dtype")
    new, old = (config.choice(name, DTYPES, "float32") if config.has(name) else None for name in names)
    if new and old and new != old:
        config.refuse("torch_dtype", f"the same as dtype = {new}")
    return new or old or "float32"


def check_common(config: Fields, architecture: str) -> None:
    """Refuse another head than the language model's, and what no parser here could honour."""
    names = config.values.get("architectures")
    if names is not None and not (isinstance(names, list) and (not names or architecture in names)):
        config.refuse("architectures", f"a list with {architecture} in it")
    for key, neutral in FOREIGN_KEYS.items():
        config.neutral(key, neutral, "not supported for this model_type")


def layer_windows(
    config: Fields, num_layers: int, window: int | None, default: Sequence[str] | None
) -> tuple[int | None, ...]:
    """Window of each layer from `layer_types`, or from the family's rule when the config has none."""
    types = config.values.get("layer_types")
    if types is None:
        types = default if default is not None else ["full_attention"] * num_layers
    elif not isinstance(types, list) or len(types) != num_layers:
        config.refuse("layer_types", f"a list of num_hidden_layers = {num_layers} names")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            config.refuse("layer_types", "a list of full_attention and sliding_attention")
        if name == "sliding_attention" and window is None:
            config.refuse("sliding_window", "an integer, as layer_types has sliding_attention")
    return tuple(window if name == "sliding_attention" else None for name in types)


def served_length(config: Fields, rope: RopeSpec) -> int:
    """Longest sequence that the positions are made for: scaled kinds state the length before scaling."""
    length = config.integer("max_position_embeddings", minimum=2)
    if rope.kind in ("linear", "dynamic"):
        return int(length * rope.factor)
    if rope.kind == "yarn" and rope.original_max_position is not None:
        return max(length, int(rope.original_max_position * rope.factor))
    return length


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """What `build` needs beside the config: the sizes and how one attention and one ffn of the family look."""

    family: str
    shape: Shape
    attention: Attention  # of a full-attention layer
    windows: tuple[int | None, ...]  # one a layer
    window_rope: RopeSpec | None = None  # rope of layers with a window, None = the same
    max_position: int
    activation: Activation = "silu"
    ffn_bias: bool = False
    norm_offset: float = 0.0
    sandwich: bool = False
    default_eps: float = 1e-6
    default_tied: bool = False
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    names: TensorNames = field(default_factory=TensorNames)


def build(config: Fields, parts: Decoder) -> ArchSpec:
    norms = Norms(
        eps=config.number("rms_norm_eps", parts.default_eps), offset=parts.norm_offset, sandwich=parts.sandwich
    )
    ffn = GatedFfn(size=parts.shape.ffn_size, activation=parts.activation, bias=parts.ffn_bias)
    full = parts.attention
    layers = []
    for window in parts.windows:
        if window is not None and window < parts.max_position:
            mixer = replace(full, window=window, rope=parts.window_rope or full.rope)
        elif window is not None:  # sees every position there is: a full layer, with its own rope
            mixer = replace(full, rope=parts.window_rope or full.rope)
        else:
            mixer = full
        layers.append(LayerSpec(mixer=mixer, ffn=ffn, norms=norms))
    vocab = parts.shape.vocab_size
    bos = config.token_ids("bos_token_id", vocab)
    return ArchSpec(
        family=parts.family,
        hidden_size=parts.shape.hidden_size,
        vocab_size=vocab,
        layers=tuple(layers),
        tied_embeddings=config.boolean("tie_word_embeddings", parts.default_tied),
        max_position=parts.max_position,
        embedding_scale=parts.embedding_scale,
        logit_cap=parts.logit_cap,
        final_norm=replace(norms, sandwich=False),
        checkpoint_dtype=checkpoint_dtype(config),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id", vocab),
        names=parts.names,
    )


def attention(config: Fields, shape: Shape, rope: RopeSpec, **changes: object) -> Attention:
    """Scale 1 / sqrt(H) and no extras, unless `changes` say otherwise."""
    spec = Attention(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        scale=shape.head_size**-0.5,
        rope=rope,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]  # names are checked by replace


def activation(config: Fields, name: str, default: str) -> Activation:
    return cast(Activation, config.choice(name, ACTIVATIONS, default))


def no_soft_caps(config: Fields) -> None:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.neutral(name, (), "this model_type has no soft caps")


def parse_llama(config: Fields) -> ArchSpec:
    """Llama 2, 3, 3.1, 3.2 and everything saved as LlamaForCausalLM."""
    check_common(config, "LlamaForCausalLM")
    no_soft_caps(config)
    config.neutral("sliding_window", (), "LlamaForCausalLM attends to everything; Mistral has windows")
    shape = parse_shape(config)
    rope = parse_rope(config, head_size=shape.head_size)
    bias = config.boolean("attention_bias", False)
    return build(
        config,
        Decoder(
            family="llama",
            shape=shape,
            attention=attention(config, shape, rope, qkv_bias=bias, out_bias=bias),
            windows=layer_windows(config, shape.num_layers, None, None),
            max_position=served_length(config, rope),
            activation=activation(config, "hidden_act", "silu"),
            ffn_bias=config.boolean("mlp_bias", False),
        ),
    )


def parse_mistral(config: Fields) -> ArchSpec:
    """Mistral 7B and its kin: a window in every layer, where the config gives one."""
    check_common(config, "MistralForCausalLM")
    no_soft_caps(config)
    no_biases(config)
    shape = parse_shape(config)
    rope = parse_rope(config, head_size=shape.head_size)
    window = config.optional_integer("sliding_window")
    every = ["full_attention" if window is None else "sliding_attention"] * shape.num_layers
    if config.has("layer_types") and config.values["layer_types"] != every:
        config.refuse("layer_types", f"every layer {every[0]}: the model_type mistral does not mix layer types")
    return build(
        config,
        Decoder(
            family="mistral",
            shape=shape,
            attention=attention(config, shape, rope),
            windows=layer_windows(config, shape.num_layers, window, every),
            max_position=served_length(config, rope),
            activation=activation(config, "hidden_act", "silu"),
        ),
    )


def no_biases(config: Fields) -> None:
    for name in ("attention_bias", "mlp_bias"):
        config.neutral(name, (False,), "this model_type has no such bias")


def qwen_windows(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Windows only with use_sliding_window, then from layer max_window_layers on, or as layer_types says."""
    used = config.boolean("use_sliding_window", False)
    window = config.integer("sliding_window", 4096) if used else None
    if used and config.values.get("sliding_window", 0) is None:
        window = None
    first = config.integer("max_window_layers", 28, minimum=0)
    rule = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(num_layers)]
    return layer_windows(config, num_layers, window, rule)


def parse_qwen2(config: Fields) -> ArchSpec:
    """Qwen 2 and 2.5: biases on q, k and v."""
    check_common(config, "Qwen2ForCausalLM")
    no_soft_caps(config)
    config.neutral("attention_bias", (True,), "Qwen2 always has biases on q, k and v")
    config.neutral("mlp_bias", (False,), "this model_type has no such bias")
    shape = parse_shape(config)
    rope = parse_rope(config, head_size=shape.head_size)
    return build(
        config,
        Decoder(
            family="qwen2",
            shape=shape,
            attention=attention(config, shape, rope, qkv_bias=True),
            windows=qwen_windows(config, shape.num_layers),
            max_position=served_length(config, rope),
            activation=activation(config, "hidden_act", "silu"),
        ),
    )


def parse_qwen3(config: Fields) -> ArchSpec:
    """Qwen 3: RMSNorm on each head of q and k."""
    check_common(config, "Qwen3ForCausalLM")
    no_soft_caps(config)
    config.neutral("mlp_bias", (False,), "this model_type has no such bias")
    shape = parse_shape(config, {"head_dim": 128})
    rope = parse_rope(config, head_size=shape.head_size)
    bias = config.boolean("attention_bias", False)
    return build(
        config,
        Decoder(
            family="qwen3",
            shape=shape,
            attention=attention(config, shape, rope, qk_norm=True, qkv_bias=bias, out_bias=bias),
            windows=qwen_windows(config, shape.num_layers),
            max_position=served_length(config, rope),
            activation=activation(config, "hidden_act", "silu"),
        ),
    )


def parse_phi3(config: Fields) -> ArchSpec:
    """Phi-3, 3.5 (mini) and Phi-4: fused projections, partial rotary, longrope, a window in every layer if any."""
    check_common(config, "Phi3ForCausalLM")
    no_soft_caps(config)
    no_biases(config)
    shape = parse_shape(config)
    rope = parse_rope(config, head_size=shape.head_size, partial=True, default_original=4096)
    if rope.kind not in ("default", "longrope"):
        name = "rope_scaling" if config.has("rope_scaling") else "rope_parameters"
        config.refuse(name, "the type longrope or default")
    window = config.optional_integer("sliding_window")
    every = ["full_attention" if window is None else "sliding_attention"] * shape.num_layers
    return build(
        config,
        Decoder(
            family="phi3",
            shape=shape,
            attention=attention(config, shape, rope),
            windows=layer_windows(config, shape.num_layers, window, every),
            max_position=served_length(config, rope),
            activation=activation(config, "hidden_act", "silu"),
            default_eps=1e-5,
            names=TensorNames(fused=True),
        ),
    )
