"""The passes of a block over its pixels where activations and gradients are made on the way (reference.operands).

Activations are (N, C, H, W), weights (outputs, C / groups, kh, kw) in the activations' dtype; vectors, sums and
gradients of weights are in the statistics dtype. ``every``: of the pixels one in so many, down and across.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from resnet_fused.reference import folded
from resnet_fused.reference.batch_norm_stats import batch_norm_stats
from resnet_fused.reference.bn_add_relu import behind_relu
from resnet_fused.reference.bn_relu import bn_relu_backward_reduce
from resnet_fused.reference.layout import dense, statistics_dtype, widened
from resnet_fused.reference.operands import (
    Activation,
    Gradient,
    MaybeTensor,
    Window,
    gradient_slopes,
    norm_terms,
)

#: An Activation, a Gradient, or mean, invstd, weight and bias of a batch norm, as the dispatcher takes them.
Fields = list[MaybeTensor]


def activation(fields: Fields) -> Activation:
    return Activation(*fields)  # type: ignore[arg-type]


def gradient(fields: Fields) -> Gradient:
    return Gradient(*fields)  # type: ignore[arg-type]


def window(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Window:
    return Window((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


def seen(x: Tensor, every: list[int]) -> Tensor:
    """Every so-manyth pixel of ``x``, channels_last."""
    if tuple(every) == (1, 1):
        return x
    return x[:, :, :: every[0], :: every[1]].contiguous(memory_format=torch.channels_last)


def conv_stats(
    source: Fields,
    conv: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    measure: bool,
    gamma: MaybeTensor = None,
    beta: MaybeTensor = None,
) -> tuple[Tensor, ...]:
    """y = conv(a), channels_last; with ``measure`` its mean, biased variance, invstd and terms, else empty vectors.

    Args:
        gamma, beta: weight and bias of y's batch norm, (outputs,), for its terms (operands.norm_terms).
    """
    a = activation(source).value()
    y = window(stride, padding, dilation, groups).convolve(a, conv)
    y = _channels_last(y)
    if not measure:
        return y, *nothing(y, 4)
    mean, var, invstd = batch_norm_stats(y, eps)
    return y, mean, var, invstd, norm_terms(mean, invstd, gamma, beta)


def gram(source: Fields, every: list[int]) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased covariance (C, C) of the channels of an activation."""
    return folded.gram(seen(activation(source).value(), every))


def expand(
    source: Fields,
    conv: MaybeTensor,
    norm: Fields,
    skip: Tensor,
    skip_shift: MaybeTensor,
    skip_conv: MaybeTensor,
    skip_norm: Fields,
    every: list[int],
) -> tuple[Tensor, Tensor]:
    """relu(bn(a) + shortcut) and the mask of its ReLU, with a convolved by ``conv`` (1x1) where that is given.

    The shortcut is ``skip``; with ``skip_conv`` that of (skip - skip_shift) at some pixels; with skip_norm behind a
    batch norm.
    """
    other = Activation(skip, shift=skip_shift).value()
    mean, invstd, weight, bias = norm
    assert mean is not None and invstd is not None
    a = activation(source).value()
    shortcut = seen(other, every), skip_conv, *skip_norm
    out, mask = folded.folded_add_relu(a, conv, mean, invstd, weight, bias, *shortcut)  # type: ignore[arg-type]
    return _channels_last(out), mask


def folded_wgrad(
    grad: Tensor, bits: Tensor, source: Fields, every: list[int], skip: Fields, skip_every: list[int]
) -> tuple[Tensor, ...]:
    """What backward takes from dz, the gradient behind the ReLU of ``expand``, for one or two folded convolutions.

    Args:
        grad: (N, outputs, H, W), of the output of ``expand``; bits: its mask.
        source, skip: the inputs of the convolutions, C and K channels; ``skip`` has no statistics, or no fields at all.

    Returns:
        Q = dz^T a of source: (outputs, C), and of skip: (outputs, K), or empty; dz summed over the pixels: (outputs,).
    """
    dz = behind_relu(grad, bits, dense(grad))
    rows = dz.permute(0, 2, 3, 1).flatten(0, 2)

    def product(a: Activation, every: list[int]) -> Tensor:
        return rows.t() @ widened(seen(a.value(), every)).permute(0, 2, 3, 1).flatten(0, 2)

    other = product(activation(skip), skip_every) if skip else nothing(grad, 1)[0]
    return product(activation(source), every), other, dz.sum((0, 2, 3), dtype=torch.float64).to(dz.dtype)


def folded_dgrad(
    grad: Tensor,
    bits: Tensor,
    factors: Fields,
    source: Fields,
    every: list[int],
    skip_factors: Fields,
    skip: Fields,
    skip_every: list[int],
) -> tuple[Tensor, ...]:
    """da = dz scaled + a square^T + vector of one or two folded convolutions, and the sums that ``dgrad`` returns.

    Args:
        grad, bits, source, skip: as for ``folded_wgrad``.
        factors, skip_factors: scaled: (outputs, C, 1, 1); square: (C, C, 1, 1) and vector: (C,), or both None.

    Returns:
        da: (N, C, H, W) of source; that of skip, or empty; sum_dz, sum_dz_xhat and slopes of the first.
    """
    dz = behind_relu(grad, bits, dense(grad))

    def input_gradient(a: Activation, every: list[int], factors: Fields) -> Tensor:
        scaled, square, vector = factors
        assert scaled is not None
        da = F.conv2d(dz, widened(scaled).transpose(0, 1))
        if square is not None and vector is not None:
            da = da + F.conv2d(widened(seen(a.value(), every)), widened(square)) + vector.view(1, -1, 1, 1)
        return _channels_last(da.to(grad.dtype))

    a = activation(source)
    da = input_gradient(a, every, factors)
    dskip = grad.new_empty(0)
    if skip:
        dskip = input_gradient(activation(skip), skip_every, skip_factors)
    return da, dskip, *sums_below(da, a)


def dgrad(
    dy: Fields,
    conv: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    below: Fields,
    residual: MaybeTensor,
    residual_bits: MaybeTensor,
    every: list[int],
) -> tuple[Tensor, ...]:
    """da, the gradient of a convolution's input ``below``, and what its batch norm needs of it.

    Args:
        residual: added to da at every so-manyth pixel, behind residual_bits where they are given.

    Returns:
        da: like below's x.
        sum_dz, sum_dz_xhat: (C,) each, of da behind the ReLU, where ``below`` has statistics; else empty.
        slopes: (3, C), what operands.gradient_slopes makes of the sums; empty as they are.
    """
    source, g = activation(below), widened(gradient(dy).value())
    geometry = (stride, padding, dilation, groups)
    da = conv2d_input(source.x.shape, widened(conv), g, *geometry)
    if residual is not None:
        more = widened(residual)
        if residual_bits is not None:
            more = behind_relu(residual, residual_bits, dense(residual))
        da[:, :, :: every[0], :: every[1]] += more
    out = torch.empty_like(source.x).copy_(da)
    return out, *sums_below(out, source)


def wgrad(
    dy: Fields,
    source: Fields,
    conv: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient of ``conv`` (given for its shape), channels_last, in the statistics dtype."""
    g, a = widened(gradient(dy).value()), widened(activation(source).value())
    geometry = (stride, padding, dilation, groups)
    return _channels_last(conv2d_weight(a, conv.shape, g, *geometry))


def conv_backward(
    dy: Fields,
    source: Fields,
    conv: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: MaybeTensor,
    residual_bits: MaybeTensor,
    every: list[int],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """What ``dgrad`` and ``wgrad`` return of one convolution; empty what is not needed.

    Args:
        needs: whether the gradient of the input is needed, and that of the weight.
    """
    x, geometry = activation(source).x, (stride, padding, dilation, groups)
    of_input: tuple[Tensor, ...] = x.new_empty(0), *nothing(x, 3)
    if needs[0]:
        of_input = dgrad(dy, conv, *geometry, source, residual, residual_bits, every)
    dconv = wgrad(dy, source, conv, *geometry) if needs[1] else nothing(x, 1)[0]
    return *of_input, dconv


def sums_below(da: Tensor, below: Activation) -> tuple[Tensor, ...]:
    if below.mean is None or below.invstd is None:
        return nothing(da, 3)
    norm = below.mean, below.invstd, below.weight, below.bias
    dz, dz_xhat = bn_relu_backward_reduce(da, below.x, *norm)
    pixels = below.x.numel() // below.x.shape[1]
    return dz, dz_xhat, gradient_slopes(dz, dz_xhat, below.mean, below.invstd, norm_terms(*norm), pixels)


def nothing(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Empty vectors, where an op always has as many results."""
    return tuple(like.new_empty(0, dtype=statistics_dtype(like.dtype)) for _ in range(count))


def _channels_last(x: Tensor) -> Tensor:
    """With exactly those strides, where others would do too: of a single channel, or without elements."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
