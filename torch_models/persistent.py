"""A FusedDecoder's decode step in one launch, where the model is of the kind and size that the kernel is ahead for.

Called by backends/torch/graphs.py. The kernel takes Llama-like layers in bfloat16, all alike, with rope over whole
heads and one pool of pages; a model with anything else leaves its steps to FusedDecoder.run. Importing this needs
triton.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_kernels.cuda_module import CompileError, runs_on
from cuda_kernels.persistent import LayerTensors, PersistentDecode, Shape
from engine.specs.arch import ArchSpec, LayerSpec
from torch_models.decoder import Layer
from torch_models.fused import FusedDecoder

# Where it was measured ahead: width, query and KV heads, head size, ffn width; rows of a step; keys of all its rows.
MEASURED = ((1024, 16, 8, 128, 3072),)
MOST_ROWS = 1
MOST_KEYS = 8192
LOGGER = logging.getLogger(__name__)


def persistent_decode(
    fused: FusedDecoder, caches: Sequence[Tensor], places: Sequence[tuple[int, int, int]]
) -> PersistentDecode | None:
    """The kernel over a decoder's weights, compiled, for steps of up to MOST_ROWS rows and MOST_KEYS keys.

    None where all steps are to take FusedDecoder.run.
    caches: one a pool, [L, 2, P, K, page, H]; places: per layer (group, pool, index of the layer within its pool).
    """
    shape, device = shape_of(fused.spec, caches[0].shape[4]), fused.embed.device
    if shape is None or len(caches) != 1 or not runs_on(device):
        return None
    tensors = [fused.embed, fused.head, caches[0], *(w for layer, _ in fused.layers for w in weights_of(layer))]
    if any(not isinstance(tensor, Tensor) or tensor.dtype != torch.bfloat16 for tensor in tensors):
        return None
    first, last = fused.spec.layers[0].norms, fused.spec.final_norm
    try:
        return PersistentDecode(
            shape,
            [layer_tensors(layer, caches[0][at]) for (layer, _), (_, _, at) in zip(fused.layers, places, strict=True)],
            fused.final_norm,
            fused.head,  # type: ignore[arg-type]  # a plain tensor, as was seen
            norms=(first.eps, first.offset, last.eps, last.offset),
            scale=fused.spec.layers[0].mixer.scale,
            rows=MOST_ROWS,
        )
    except CompileError as error:
        LOGGER.warning("decode steps take five launches a layer: %s", error)
        return None


def shape_of(spec: ArchSpec, page: int) -> Shape | None:
    """What the kernel is compiled for, or None where it does not serve the model."""
    layer = spec.layers[0]
    if any(other != layer for other in spec.layers) or not plain(layer):
        return None
    mixer = layer.mixer
    shape = Shape(
        layers=len(spec.layers), width=spec.hidden_size, heads=mixer.num_heads, kv_heads=mixer.num_kv_heads,
        head_size=mixer.head_size, ffn=layer.ffn.size, vocab=spec.vocab_size, qk_norm=mixer.qk_norm,
        page=page,
    )  # fmt: skip
    sizes = (shape.width, shape.heads, shape.kv_heads, shape.head_size, shape.ffn)
    return shape if sizes in MEASURED and shape.fits() else None


def plain(layer: LayerSpec) -> bool:
    """Whether a layer has nothing that the kernel lacks."""
    mixer, ffn = layer.mixer, layer.ffn
    whole = mixer.rope is not None and mixer.rope.rotary_size == mixer.head_size
    free = mixer.window is None and mixer.logit_cap is None and not (mixer.qkv_bias or mixer.out_bias or ffn.bias)
    return whole and free and ffn.activation == "silu" and not layer.norms.sandwich


def weights_of(layer: Layer) -> tuple[object, object, object, object]:
    return layer.mixer.qkv, layer.mixer.o, layer.ffn.gate_up, layer.ffn.down


def layer_tensors(layer: Layer, pages: Tensor) -> LayerTensors:
    """pages: [2, P, K, page, H]."""
    mixer, ffn, normed = layer.mixer, layer.ffn, layer.spec.mixer.qk_norm
    return LayerTensors(
        attn_norm=layer.attn_norm, q_norm=mixer.q_norm if normed else None, k_norm=mixer.k_norm if normed else None,
        ffn_norm=layer.ffn_norm, qkv=mixer.qkv, o=mixer.o, gate_up=ffn.gate_up, down=ffn.down,
        keys=pages[0], values=pages[1],
    )  # fmt: skip
