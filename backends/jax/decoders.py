"""Which decoder a program is traced with: the one whose layers its platform's kernels take.

Called by forward.py and programs.py while a program is traced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from backends.jax.stacks import whole_layers
from engine.specs.arch import ArchSpec
from engine.specs.cache import CacheLayout
from jax_models.decoder import Decoder
from jax_models.fused import FusedDecoder
from jax_models.scanned import ScannedDecoder
from jax_models.turned import HEAD_NORMS, TurnedDecoder
from pallas_kernels.dispatch import has_whole_layers, takes_parts, turns_heads


@dataclass(frozen=True, slots=True)
class Traits:
    """What a forward program is built for, besides its shape."""

    arch: ArchSpec
    part: ArchSpec  # of it, what one device computes
    layout: CacheLayout
    max_model_len: int
    kernels: tuple[str, ...]  # one a group
    null_slot: int
    block_rows: int  # rows of logits computed at once, where any is wanted; 0: all, always
    ranks: int = 1  # devices that share every layer
    split_tokens: int = 0  # steps of so many tokens and more are split over the ranks between products, 0 = none
    stacks: dict[int, tuple[int, int]] = field(default_factory=dict)  # where a layer's stacked weights lie


def make_decoder(params: dict[str, Any], traits: Traits, tokens: int) -> Decoder:
    """The decoder: a scan where weights are stacked, in whole-layer calls where they are made for so few tokens."""
    arch = traits.part
    if "layers" not in params:
        return ScannedDecoder(arch, params, traits.max_model_len, traits.stacks)
    turned = all(map(turns_heads, traits.kernels))
    params = whole_layers(params, traits.stacks, HEAD_NORMS if turned else ())
    if turned:
        return TurnedDecoder(arch, params, traits.max_model_len)
    dtype = params["embed"].dtype.name
    whole = (
        traits.ranks == 1
        and all(map(takes_parts, params["layers"]))
        and all(
            has_whole_layers(kernel, tokens, group.spec.head_size, dtype)
            for kernel, group in zip(traits.kernels, traits.layout.groups, strict=True)
        )
    )
    return (FusedDecoder if whole else Decoder)(arch, params, traits.max_model_len)
