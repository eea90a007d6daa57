"""What a convolution of a block is given, before it exists: an activation and a gradient by their parts.

``relu(bn(y))`` and the gradient behind a batch norm are one or two multiply-adds per element of what lies in memory. An
op that makes them on the way takes their parts, as a list of tensors in the order of the fields here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.reference.batch_norm import affine, input_gradient, is_kept, scale
from resnet_fused.reference.bn_add_relu import behind_relu
from resnet_fused.reference.layout import dense, like_layout, stored, widened

MaybeTensor = Tensor | None
Pair = tuple[int, int]


def norm_terms(mean: Tensor, invstd: Tensor, weight: MaybeTensor, bias: MaybeTensor) -> Tensor:
    """(3, C) scale, bias and offset: a batch norm is (y - mean) * scale + bias, and also y * scale + offset."""
    factor = scale(invstd, weight)
    bias = torch.zeros_like(mean) if bias is None else bias
    return torch.stack([factor, bias, (bias - mean.double() * factor).to(mean.dtype)])


def gradient_slopes(
    sum_dz: Tensor, sum_dz_xhat: Tensor, mean: Tensor, invstd: Tensor, terms: Tensor, pixels: int
) -> Tensor:
    """(3, C) slope, level and offset: dy = dz * scale - level - (y - mean) * slope = dz * scale - (y * slope + offset).

    Args:
        sum_dz, sum_dz_xhat, mean, invstd: (C,); terms: ``norm_terms`` of the batch norm.
        pixels: of y.
    """
    factor = terms[0].double() / max(pixels, 1)
    slope = (factor * invstd * sum_dz_xhat).to(mean.dtype)
    level = factor * sum_dz
    # Of the slope as it is rounded: what rounding loses is then multiplied with y - mean, not with y.
    return torch.stack([slope, level.to(mean.dtype), (level - mean.double() * slope).to(mean.dtype)])


class Activation(NamedTuple):
    """x; x - shift; or, where statistics are given, relu(bn(x)) - shift. Vectors are (C,), in the statistics dtype.

    terms: ``norm_terms`` of the statistics, where they are known already; they change no value.
    """

    x: Tensor
    mean: MaybeTensor = None
    invstd: MaybeTensor = None
    weight: MaybeTensor = None
    bias: MaybeTensor = None
    shift: MaybeTensor = None
    terms: MaybeTensor = None

    def value(self) -> Tensor:
        """The activation itself, rounded once, with layout and dtype of x."""
        x = dense(self.x)
        if self.mean is None and self.shift is None:
            return x
        a = widened(x)
        if self.mean is not None:
            assert self.invstd is not None
            a = torch.relu(affine(a, self.mean, self.invstd, self.weight, self.bias))
        return stored(a if self.shift is None else a - self.shift.view(1, -1, 1, 1), x)


class Gradient(NamedTuple):
    """dy of a convolution's output y, by the gradient g of what stands behind y's batch norm (see input_gradient).

    bits: a ReLU's mask (layout.pack_mask) that g must still pass. Where y and statistics are given and bits are not,
    g is that of relu(bn(y)). Without statistics dy is g behind its mask. Both sums None: the statistics are constants.
    terms, slopes: ``norm_terms`` and ``gradient_slopes``, where they are known already; they change no value.
    """

    g: Tensor
    bits: MaybeTensor = None
    y: MaybeTensor = None
    mean: MaybeTensor = None
    invstd: MaybeTensor = None
    weight: MaybeTensor = None
    bias: MaybeTensor = None
    sum_dz: MaybeTensor = None
    sum_dz_xhat: MaybeTensor = None
    terms: MaybeTensor = None
    slopes: MaybeTensor = None

    def value(self) -> Tensor:
        """The gradient itself, rounded once, channels_last, in the dtype of g."""
        g = self.g.contiguous(memory_format=torch.channels_last)
        dz = widened(g) if self.bits is None else behind_relu(g, self.bits, g)
        if self.mean is not None:
            assert self.y is not None and self.invstd is not None
            y = widened(like_layout(self.y, g))
            if self.bits is None:
                kept = is_kept(affine(y, self.mean, self.invstd, self.weight, self.bias))
                dz = torch.where(kept, dz, 0)
            dz = input_gradient(dz, y, self.mean, self.invstd, self.weight, self.sum_dz, self.sum_dz_xhat)
        return stored(dz, g)


class Window(NamedTuple):
    """Geometry of a convolution beside its weight's."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def convolve(self, x: Tensor, conv: Tensor) -> Tensor:
        return F.conv2d(x, conv, None, self.stride, self.padding, self.dilation, self.groups)

    def out_size(self, x: Tensor, conv: Tensor) -> Pair:
        """Height and width of what the convolution makes of ``x``."""
        sizes = [
            (x.shape[i + 2] + 2 * self.padding[i] - self.dilation[i] * (conv.shape[i + 2] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        ]
        return sizes[0], sizes[1]
