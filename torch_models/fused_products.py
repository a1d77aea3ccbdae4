"""Products of the fused decoder: plain weights take one launch with what belongs to them, those in few bits take two.

Called by fused.py. Importing this needs triton. Letters: T tokens · I in · O out · D width.
"""

from __future__ import annotations

from torch import Tensor

from cuda_kernels import dispatch, fused, quant_linear, small_linear, split_sum, wide_gated
from cuda_kernels.quant_weight import Parts, QuantWeight, Weight, WideWeight
from cuda_kernels.small_linear_plan import LIBRARY
from cuda_kernels.split_sum import Sum
from engine.specs import arch

Stream = Tensor | Sum
"""A residual stream, [T, D], or what is still to be added up to it."""


def added_up(stream: Stream) -> Tensor:
    return stream if isinstance(stream, Tensor) else stream.total()


def fused_quant_linear(
    x: Tensor,
    weight: QuantWeight | Parts | WideWeight,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    norm: tuple[Tensor, float, float] | None = None,
    activation: str = "",
) -> Tensor:
    """residual + rms_norm(x) @ weight.T + bias, or act(gate) * up in the place of the norm.

    x: [T, I], with an activation [T, 2 I]; weight: [O, I]; residual: [T, O], the caller's no more; norm: weight f32
    [I], eps, offset.
    """
    if isinstance(weight, QuantWeight) and dispatch.quant_products(weight.scheme, x.device) is quant_linear:
        return quant_linear.linear(x, weight, bias, residual, norm=norm, activation=activation)
    if norm is not None:
        x = fused.rms_norm(x, *norm)
    elif activation:
        x = fused.gated(x, activation)
    out = dispatch.linear(x, weight, bias)
    return out if residual is None else residual.add_(out)


def add_product(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None) -> Stream:
    """residual + x @ weight.T + bias, as pieces where these are added up while the next norm reads them."""
    if residual is None or not isinstance(weight, Tensor) or small_linear.choose(x, weight) is not LIBRARY:
        return product(x, weight, bias, residual)
    if split_sum.is_cut(len(x), weight.shape[0], weight.shape[1], x.device):
        return split_sum.multiply(x, weight, bias, residual)
    return small_linear.linear_add(x, weight, bias, residual, plan=LIBRARY)


def product(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """residual + x @ weight.T + bias. x: [T, I]; weight: [O, I]; residual: [T, O], the caller's no more -> [T, O]."""
    if not isinstance(weight, Tensor):
        return fused_quant_linear(x, weight, bias, residual)
    if residual is None:
        return small_linear.linear(x, weight, bias)
    return small_linear.linear_add(x, weight, bias, residual)


def norm_linear(x: Tensor, norm: Tensor, norms: arch.Norms, weight: Weight, bias: Tensor | None) -> Tensor:
    """rms_norm(x) @ weight.T + bias. x: [T, I]; norm: f32 [I]; weight: [O, I] -> [T, O]."""
    if isinstance(weight, Tensor):
        return small_linear.norm_linear(x, norm, norms.eps, norms.offset, weight, bias)
    return fused_quant_linear(x, weight, bias, norm=(norm, norms.eps, norms.offset))


def norm_gated(x: Tensor, norm: Tensor, norms: arch.Norms, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """act(gate) * up of rms_norm(x). x: [T, I]; norm: f32 [I]; weight: [2F, I]; kind: of activation -> [T, F]."""
    if wide_gated.takes(len(x), weight):
        return wide_gated.multiply(fused.rms_norm(x, norm, norms.eps, norms.offset), weight, bias, kind)
    return small_linear.norm_gated(x, norm, norms.eps, norms.offset, weight, bias, kind)


def gated_product(x: Tensor, weight: Weight, bias: Tensor | None, kind: str) -> Tensor:
    """act(gate) * up of x @ weight.T + bias. x: [T, I]; weight: [2F, I] -> [T, F]."""
    if isinstance(weight, Tensor) and wide_gated.takes(len(x), weight):
        return wide_gated.multiply(x, weight, bias, kind)
    return fused.gated(product(x, weight, bias), kind)
