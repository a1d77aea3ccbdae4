"""The ParamSpec table: every parameter of an architecture once, as data.

Loading, dummy weights, shards, byte counts and `twinfer inspect` all go through `param_table(arch)`. Parameters are
logical (q, k and v apart, [out, in] as checkpoints have them); a backend's Storage table says how it keeps them (fused,
stacked, transposed, padded). Owned by specs; needs the standard library and numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.specs.arch import ArchSpec

# Logical axes. "heads", "kv_heads" are N * H and K * H wide; "embed" D; "ffn" F; "vocab" V; "head" H.


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a parameter lies in a checkpoint: a whole tensor, or rows [start, stop) of its first axis."""

    name: str
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """One logical parameter.

    name: "embed", "final_norm", "head", or "layers.{i}.{part}" with part one of
        attn_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, post_attn_norm,
        ffn_norm, gate, up, down, gate_bias, up_bias, down_bias, post_ffn_norm.
    shape: weights are [out, in], as in checkpoints.
    axes: logical axis of each dimension.
    sources: checkpoint spellings, the first that is present wins (e.g. with or without a "model." prefix).
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sources: tuple[Source, ...]
    init: str = "normal"  # dummy weights: "normal" | "ones" | "zeros"

    @property
    def num_elements(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


def param_table(arch: ArchSpec) -> tuple[ParamSpec, ...]:
    """Every parameter of `arch`, in model order. A tied head has no entry of its own."""
    raise NotImplementedError
