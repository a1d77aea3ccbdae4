"""Reads the rope part of a config.json, as transformers 4 and 5 spell it, into a RopeSpec.

transformers 4: "rope_theta" and "rope_scaling" {"type" or "rope_type", ...} at the top level.
transformers 5: "rope_parameters" {"rope_type", "rope_theta", ...}, or one such object per layer type.
Keys that the kind does not know are refused by name: an ignored rope setting is a wrong model.
"""

from __future__ import annotations

from typing import get_args

from engine.specs.arch import RopeKind, RopeSpec
from engine.specs.families.fields import Fields

COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
COMMON_KEYS |= {"finetuned"}  # says how a yarn model was made
KIND_KEYS: dict[str, set[str]] = {
    "default": {"factor"},
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
ALIASES = {"su": "longrope", "none": "default"}
LAYER_TYPES = ("full_attention", "sliding_attention")


def parse_rope(
    config: Fields,
    *,
    head_size: int,
    layer_type: str = "full_attention",
    default_theta: float = 10000.0,
    partial: bool = False,
    default_original: int | None = None,
) -> RopeSpec:
    """The rope of the layers of one type. partial: the family may turn only a part of each head."""
    params = rope_params(config, layer_type)
    theta = params.optional_number("rope_theta", 1.0)
    top_theta = config.optional_number("rope_theta", 1.0) if layer_type == "full_attention" else None
    if theta is not None and top_theta is not None and theta != top_theta:
        config.refuse("rope_theta", f"the same base as {params.where}: rope_theta = {theta:g}")
    rotary = rotary_size(config, params, head_size, partial)
    return rope_spec(config, params, rotary, theta or top_theta or default_theta, default_original)


def rotary_size(config: Fields, params: Fields, head_size: int, partial: bool) -> int:
    """Leading dims of a head that turn: the head size, times partial_rotary_factor where the family has one."""
    share = params.optional_number("partial_rotary_factor")
    share = config.optional_number("partial_rotary_factor") if share is None else share
    share = 1.0 if share is None else share
    if share > 1 or (share != 1 and not partial):
        holder = params if params.has("partial_rotary_factor") else config
        holder.refuse("partial_rotary_factor", "a number in (0, 1]" if partial else "1.0 for this model_type")
    size = int(head_size * share)
    if size < 2 or size % 2:
        holder = params if params.has("partial_rotary_factor") else config
        holder.refuse("partial_rotary_factor" if share != 1 else "head_dim", f"an even rotary size, got {size}")
    return size


def rope_params(config: Fields, layer_type: str) -> Fields:
    """The object that holds the rope settings of `layer_type`; an empty one when the config has none."""
    old, new = config.table("rope_scaling"), config.table("rope_parameters")
    if old is not None and old.values and new is not None and new.values and old.values != new.values:
        config.refuse("rope_scaling", "null where rope_parameters is given")
    params = old if old is not None and old.values else new
    if params is None:
        return Fields({}, f"{config.where}: rope_parameters")
    if any(key in LAYER_TYPES for key in params.values):
        for key in params.values:
            if key not in LAYER_TYPES:
                params.refuse(key, "only entries named " + " and ".join(LAYER_TYPES))
        return params.table(layer_type) or Fields({}, f"{params.where}: {layer_type}")
    return params


def rope_kind(params: Fields) -> str:
    """The kind under either key; both given must agree."""
    for key in ("rope_type", "type"):
        value = params.values.get(key)
        if value is not None and (not isinstance(value, str) or ALIASES.get(value, value) not in get_args(RopeKind)):
            params.refuse(key, "one of " + ", ".join(get_args(RopeKind)))
    new, old = params.values.get("rope_type"), params.values.get("type")
    if new is not None and old is not None and ALIASES.get(new, new) != ALIASES.get(old, old):
        params.refuse("type", f"the same kind as rope_type = {new!r}")
    kind = new or old or "default"
    return ALIASES.get(kind, kind)


def rope_spec(config: Fields, params: Fields, rotary_size: int, theta: float, default_original: int | None) -> RopeSpec:
    kind = rope_kind(params)
    for key in params.values:
        if key not in COMMON_KEYS | KIND_KEYS[kind] and params.has(key):
            params.refuse(key, f"no such key for rope type {kind!r}")
    if kind == "default":
        params.neutral("factor", (1, 1.0), "rope type 'default' does not scale")
    max_position = config.integer("max_position_embeddings", minimum=2)
    original = original_max_position(config, params)
    if original is None and kind in ("llama3", "yarn", "longrope"):
        original = default_original or max_position
    factor = scaling_factor(params, kind, max_position, original)
    half = rotary_size // 2
    low, high = params.number("low_freq_factor", 1.0), params.number("high_freq_factor", 4.0)
    if kind == "llama3" and not (params.has("low_freq_factor") and params.has("high_freq_factor") and low < high):
        params.refuse("high_freq_factor", f"a number above low_freq_factor ({low:g}), both given")
    return RopeSpec(
        kind=kind,  # type: ignore[arg-type]  # rope_kind checked it against RopeKind
        theta=theta,
        rotary_size=rotary_size,
        max_position=max_position,
        original_max_position=original,
        factor=factor,
        attention_factor=params.optional_number("attention_factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=params.number("beta_fast", 32.0),
        beta_slow=params.number("beta_slow", 1.0),
        mscale=params.optional_number("mscale", open_min=False),
        mscale_all_dim=params.optional_number("mscale_all_dim", open_min=False),
        truncate=params.boolean("truncate", True),
        short_factor=params.numbers("short_factor", half) if kind == "longrope" else (),
        long_factor=params.numbers("long_factor", half) if kind == "longrope" else (),
    )


def original_max_position(config: Fields, params: Fields) -> int | None:
    """Either place may hold it; where both do they must agree."""
    name = "original_max_position_embeddings"
    outer, inner = config.optional_integer(name, 2), params.optional_integer(name, 2)
    if outer is not None and inner is not None and outer != inner:
        params.refuse(name, f"the same number as the top-level {name} = {outer}")
    return inner if outer is None else outer


def scaling_factor(params: Fields, kind: str, max_position: int, original: int | None) -> float:
    """`factor`; yarn and longrope may leave it out, then it is the ratio of the two lengths."""
    factor = params.optional_number("factor")
    if factor is None:
        if kind in ("yarn", "longrope") and original is not None:
            return max_position / original
        if kind != "default":
            params.refuse("factor", "a number >= 1")
        return 1.0
    if factor < 1:
        params.refuse("factor", "a number >= 1")
    return factor
