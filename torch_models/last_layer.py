"""A decoder's last layer over the sampled tokens alone, behind the keys and values of all tokens.

Called by backends/torch/eager.py: nothing reads what the last layer makes of the other tokens. fused.py does the same
in its own launches. Letters: T tokens · D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cuda_kernels.dispatch import Work, write_keys
from torch_models.decoder import Decoder, Turns
from torch_models.layers import embed, rms_norm

Places = Sequence[tuple[int, int, int]]


def front(
    decoder: Decoder, token_ids: Tensor, turns: Turns, caches: list[Tensor], places: Places, works: Sequence[Work]
) -> Tensor:
    """All layers but the last, [T, D]. turns: of Decoder.turns; the rest as Decoder.forward has it."""
    x = embed(token_ids, decoder.embed, decoder.spec.embedding_scale)
    for layer, (group, pool, layer_index) in zip(decoder.layers, places[:-1], strict=False):
        cos, sin = turns[layer.spec.mixer.rope]
        x, caches[pool] = layer.forward(x, cos, sin, caches[pool], layer_index, works[group])
    return x


def write(
    decoder: Decoder, x: Tensor, turns: Turns, caches: list[Tensor], places: Places, works: Sequence[Work]
) -> None:
    """The last layer's keys and values. x: [T, D], of `front`."""
    layer, (group, pool, layer_index) = decoder.layers[-1], places[-1]
    norms, (cos, sin) = layer.spec.norms, turns[layer.spec.mixer.rope]
    _, k, v = layer.mixer.turned(rms_norm(x, layer.attn_norm, norms.eps, norms.offset), cos, sin)
    write_keys(k, v, caches[pool], layer_index, works[group])


def behind(
    decoder: Decoder, x: Tensor, turns: Turns, caches: list[Tensor], places: Places, works: Sequence[Work]
) -> Tensor:
    """The last layer and the final norm. x: [T, D], of `front`, some of its tokens as a step of their own -> [T, D]."""
    layer, (group, pool, layer_index) = decoder.layers[-1], places[-1]
    cos, sin = turns[layer.spec.mixer.rope]
    x, caches[pool] = layer.forward(x, cos, sin, caches[pool], layer_index, works[group])
    norm = decoder.spec.final_norm
    return rms_norm(x, decoder.final_norm, norm.eps, norm.offset)
