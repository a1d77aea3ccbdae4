"""From a checkpoint's tensors to a QuantWeight: unpacks, turns, sorts and joins, on the device that holds them.

Called by backends/torch/weights.py while it loads. The packings are those of AutoAWQ ("gemm"), AutoGPTQ and
compressed-tensors ("pack-quantized"); what they have in common is that a tensor's int32 holds eight numbers of 4 bits.
Letters: O out · I in · G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from cuda_kernels.quant_weight import BLOCK, NIBBLES, Act, Parts, QuantWeight, Scheme, Weight

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds column 0, 1, .. 7 of eight
E4M3_MAX = 448.0
ONES = 0x11111111  # 1 in each nibble
HALF = 8  # a symmetric weight of 4 bits is stored with 8 added


def plain_weight(scheme: str, act: str, fields: Mapping[str, Tensor], blocks: bool) -> QuantWeight:
    """fp8 and int8. data: [O, I], int8 also i32 [O, I / 4] with 128 added to each byte.

    scale: one number, [O], [O, 1], or with `blocks` [O / 128, I / 128], rounded up.
    """
    data, scale = fields["data"].contiguous(), fields["scale"].float()
    if data.dtype == torch.int32:
        data = (data.view(torch.uint8) ^ 0x80).view(torch.int8)  # less 128, as a signed byte
    if not blocks:
        scale = scale.reshape(-1).expand(data.shape[0])
    fixed = fields["act_scale"].float().reshape(1) if act == "static" else None
    return QuantWeight(
        scheme=cast(Scheme, scheme + "_block" if blocks else scheme),
        act=cast(Act, act),
        data=data,
        scale=scale.contiguous(),
        act_scale=fixed,
    )


def nibble_weight(
    layout: str, fields: Mapping[str, Tensor], group: int, zero_bias: int, dtype: torch.dtype
) -> QuantWeight:
    """w4 from the layout "awq", "gptq" or "packed", scales in `dtype`. group: 0 = a row.

    zero_bias: 1 where zeros are stored less one. It is added to the int32 as a whole: a zero of 0 has borrowed from its
    neighbours when it was stored, as GPTQModel writes and reads them.
    """
    data, scale, zeros = fields["data"], fields["scale"], fields.get("zeros")
    if zeros is not None:
        zeros = zeros + zero_bias * ONES
    if layout == "awq":  # data [I, O / 8], zeros [G, O / 8], scale [G, O]
        codes = unpack(data, AWQ_PLACES).t()
        offsets = unpack(cast(Tensor, zeros), AWQ_PLACES).t()
        scale = scale.t()
    elif layout == "gptq":  # data [I / 8, O], zeros [G, O / 8], scale [G, O]
        codes = unpack(data.t().contiguous())
        offsets = unpack(cast(Tensor, zeros)).t()
        scale = scale.t()
    else:  # data [O, I / 8], zeros [O / 8, G], scale [O, G]
        codes = unpack(data)
        offsets = scale.new_full(scale.shape, HALF, dtype=torch.uint8)
        if zeros is not None:
            offsets = unpack(zeros.t().contiguous()).t()[: scale.shape[0]]
    group = group or codes.shape[1]
    order = input_order(fields["order"]) if "order" in fields else None
    if order is not None:
        codes = codes[:, order.long()]
    return QuantWeight(
        scheme="w4",
        act="none",
        data=pack(codes),
        scale=scale.to(dtype).contiguous(),
        zeros=offsets.to(torch.int8).contiguous(),
        group=group,
        order=order,
    )


def unpack(packed: Tensor, places: Sequence[int] = range(NIBBLES)) -> Tensor:
    """u8 [R, 8 C] of i32 [R, C]: eight numbers of 0 .. 15 an entry. places: the nibble of each of the eight."""
    out = torch.empty(*packed.shape, NIBBLES, dtype=torch.uint8, device=packed.device)
    for index, place in enumerate(places):
        out[..., index] = (packed >> (4 * place)) & 0xF
    return out.flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """i32 [R, C / 8] of u8 [R, C], numbers of 0 .. 15, the first in the lowest bits."""
    pairs = codes.reshape(codes.shape[0], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)  # little endian


def input_order(groups: Tensor) -> Tensor | None:
    """i32 [I], the inputs sorted by group, None where they are. groups: i32 [I], as many inputs in each."""
    order = torch.argsort(groups, stable=True)
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return None
    return order.to(torch.int32)


def round_to_fp8(weight: Tensor) -> QuantWeight:
    """weight [O, I] with a scale a row, activations rounded per token."""
    scale = weight.abs().amax(dim=1).float().clamp_(min=1e-12) / E4M3_MAX
    data = (weight.float() / scale[:, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantWeight(scheme="fp8", act="token", data=data, scale=scale)


def joined(parts: Sequence[QuantWeight | Tensor]) -> Weight:
    """The rows of all parts as one weight where they are kept alike, else as Parts."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(cast(Sequence[Tensor], parts))
    if any(isinstance(part, Tensor) for part in parts):
        return Parts(tuple(parts))
    weights = cast(Sequence[QuantWeight], parts)
    first = weights[0]
    if not all(alike(first, other) for other in weights[1:]) or (first.scheme == "fp8_block" and uneven(weights)):
        return Parts(tuple(weights))
    return replace(
        first,
        data=torch.cat([w.data for w in weights]),
        scale=torch.cat([w.scale for w in weights]),
        zeros=None if first.zeros is None else torch.cat([cast(Tensor, w.zeros) for w in weights]),
    )


def alike(left: QuantWeight, right: QuantWeight) -> bool:
    """Whether the rows of both may stand in one weight."""
    kinds = (left.scheme, left.act, left.group) == (right.scheme, right.act, right.group)
    return kinds and same(left.order, right.order) and same(left.act_scale, right.act_scale)


def same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


def uneven(weights: Sequence[QuantWeight]) -> bool:
    """Whether blocks of one weight would reach into the next."""
    return any(weight.shape[0] % BLOCK for weight in weights[:-1])
