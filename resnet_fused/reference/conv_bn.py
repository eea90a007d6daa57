"""Convolutions of lazy operands (types): forward with the statistics of the output, and backward.

Activations are (N, C, H, W), weights (outputs, C / groups, kh, kw) in the activations' dtype; vectors, sums and
gradients of weights are in the statistics dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from resnet_fused.layout import dense, like_layout, statistics_dtype, stored, widened
from resnet_fused.reference.batch_norm import affine, input_gradient, relu_mask
from resnet_fused.reference.batch_norm_stats import batch_norm_stats
from resnet_fused.reference.bn_add_relu import relu_backward
from resnet_fused.reference.bn_relu import bn_relu_backward_reduce
from resnet_fused.types import Activation, ConvGeometry, Gradient, Pair, make_bn_coeffs, make_dy_coeffs


def activation_value(a: Activation) -> Tensor:
    """The activation itself, rounded once, with layout and dtype of a.x."""
    x = dense(a.x)
    if a.mean is None and a.shift is None:
        return x
    value = widened(x)
    if a.mean is not None:
        assert a.invstd is not None
        value = torch.relu(affine(value, a.mean, a.invstd, a.weight, a.bias))
    return stored(value if a.shift is None else value - a.shift.view(1, -1, 1, 1), x)


def gradient_value(dy: Gradient) -> Tensor:
    """The gradient itself, rounded once, channels_last, in the dtype of dy.g."""
    g = dy.g.contiguous(memory_format=torch.channels_last)
    dz = widened(g) if dy.mask is None else relu_backward(g, dy.mask, g)
    if dy.mean is not None:
        assert dy.y is not None and dy.invstd is not None
        y = widened(like_layout(dy.y, g))
        if dy.mask is None:
            dz = torch.where(relu_mask(affine(y, dy.mean, dy.invstd, dy.weight, dy.bias)), dz, 0)
        dz = input_gradient(dz, y, dy.mean, dy.invstd, dy.weight, dy.sum_dz, dy.sum_dz_xhat)
    return stored(dz, g)


def conv_bn_stats(
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    eps: float,
    training: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    coeffs: bool,
) -> tuple[Tensor, ...]:
    """y = conv(a) and, in training, the statistics of its channels.

    Args:
        gamma, beta: (outputs,), weight and bias of y's batch norm, for its coefficients.
        coeffs: whether the coefficients are needed.

    Returns:
        y: (N, outputs, H', W'), channels_last.
        mean, biased var, invstd: (outputs,), and bn_coeffs: (3, outputs), see types.make_bn_coeffs; empty where they
        are not needed.
    """
    y = channels_last(F.conv2d(activation_value(a), weight, None, *geometry))
    if not training:
        return y, *_empty(y, 4)
    mean, var, invstd = batch_norm_stats(y, eps)
    bn_coeffs = make_bn_coeffs(mean, invstd, gamma, beta) if coeffs else _empty(y, 1)[0]
    return y, mean, var, invstd, bn_coeffs


def dgrad(
    dy: Gradient,
    weight: Tensor,
    geometry: ConvGeometry,
    a: Activation,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    input_stride: Pair,
) -> tuple[Tensor, ...]:
    """da, the gradient w.r.t. a convolution's input ``a``, and the sums that backward of a's batch norm needs.

    Args:
        residual: (N, C, ceil(H / down), ceil(W / right)), added to da at every input_stride-th pixel, times its mask
            where that is given.

    Returns:
        da: like a.x.
        sum_dz, sum_dz_xhat: (C,), of da times the ReLU's mask, where ``a`` has statistics; else empty.
        dy_coeffs: (3, C), see types.make_dy_coeffs; empty where they are.
    """
    da = conv2d_input(a.x.shape, widened(weight), widened(gradient_value(dy)), *geometry)
    if residual is not None:
        more = widened(residual)
        if residual_mask is not None:
            more = relu_backward(residual, residual_mask, dense(residual))
        da[:, :, :: input_stride[0], :: input_stride[1]] += more
    out = torch.empty_like(a.x).copy_(da)
    return out, *bn_sums(out, a)


def wgrad(dy: Gradient, a: Activation, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """The gradient w.r.t. ``weight`` (given for its shape), channels_last, in the statistics dtype."""
    g, value = widened(gradient_value(dy)), widened(activation_value(a))
    return channels_last(conv2d_weight(value, weight.shape, g, *geometry))


def conv_backward(
    dy: Gradient,
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    input_stride: Pair,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """What ``dgrad`` and ``wgrad`` of one convolution return; empty what is not needed.

    Args:
        needs: whether the gradient w.r.t. the input is needed, and that w.r.t. the weight.
    """
    of_input: tuple[Tensor, ...] = a.x.new_empty(0), *_empty(a.x, 3)
    if needs[0]:
        of_input = dgrad(dy, weight, geometry, a, residual, residual_mask, input_stride)
    dweight = wgrad(dy, a, weight, geometry) if needs[1] else _empty(a.x, 1)[0]
    return *of_input, dweight


def bn_sums(da: Tensor, a: Activation) -> tuple[Tensor, ...]:
    """sum_dz, sum_dz_xhat and dy_coeffs of ``dgrad``."""
    if a.mean is None or a.invstd is None:
        return _empty(da, 3)
    norm = a.mean, a.invstd, a.weight, a.bias
    sum_dz, sum_dz_xhat = bn_relu_backward_reduce(da, a.x, *norm)
    pixels = a.x.numel() // a.x.shape[1]
    return (
        sum_dz,
        sum_dz_xhat,
        make_dy_coeffs(sum_dz, sum_dz_xhat, a.mean, a.invstd, make_bn_coeffs(*norm), pixels),
    )


def _empty(like: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0, dtype=statistics_dtype(like.dtype)) for _ in range(count))


def channels_last(x: Tensor) -> Tensor:
    """With exactly those strides, where others would do too: of a single channel, or without elements."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
