"""The operands of convolutions and batch norms, as ops and kernels take them.

``Activation`` and ``Gradient`` are lazy: they describe relu(bn(x)) and the gradient w.r.t. a convolution's output by
tensors that are in memory already. A kernel computes the value in its prologue, while it loads; the vendor
implementation materializes it first (ops.conv_bn). The dispatcher takes them as lists of tensors in the order of their
fields.

Activations are (N, C, H, W); per-channel vectors are (C,) in the statistics dtype (layout.statistics_dtype).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Pair = tuple[int, int]


def pair(values: Sequence[int]) -> Pair:
    return values[0], values[1]


class BatchNorm(NamedTuple):
    """One batch norm: its parameters, buffers and mode, as torch.nn.functional.batch_norm takes them.

    Vectors have one element per channel. ``group`` is the process group to share statistics with (SyncBatchNorm);
    ``num_batches_tracked`` counts the batches that the running statistics were updated with.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    group: dist.ProcessGroup | None = None
    num_batches_tracked: Tensor | None = None


class BatchStats(NamedTuple):
    """Mean and 1/sqrt(var + eps) per channel, in the statistics dtype.

    ``count_fraction``: this process's part of the pixels that the statistics were computed over, a scalar tensor; None
    where they are all its own. ``bn_coeffs``: ``make_bn_coeffs`` of the statistics, a cache; results do not
    depend on whether they are given.
    """

    mean: Tensor
    invstd: Tensor
    count_fraction: Tensor | None = None
    bn_coeffs: Tensor | None = None


class ConvGeometry(NamedTuple):
    """Stride, padding, dilation and groups of a convolution."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def out_size(self, x: Tensor, weight: Tensor) -> Pair:
        """Height and width of the convolution's output for an input ``x``."""
        sizes = [
            (x.shape[i + 2] + 2 * self.padding[i] - self.dilation[i] * (weight.shape[i + 2] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        ]
        return sizes[0], sizes[1]


class ConvBN(NamedTuple):
    """A convolution without bias, weight (N, K / groups, kh, kw), and the batch norm after it."""

    weight: Tensor
    bn: BatchNorm
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


class InputCovariance(NamedTuple):
    """What backward of a folded convolution needs of its centered input c = input - shift.

    All None where the statistics are the running ones: then backward needs neither.
    """

    shift: Tensor | None = None  # (K,)
    mean: Tensor | None = None  # (K,), of c
    covariance: Tensor | None = None  # (K, K), of c, biased


class Activation(NamedTuple):
    """x; x - shift; or, where statistics are given, relu(bn(x)) - shift.

    bn_coeffs: ``make_bn_coeffs`` of the statistics, a cache; results do not depend on whether they are given.
    """

    x: Tensor
    mean: Tensor | None = None
    invstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    bn_coeffs: Tensor | None = None


class Gradient(NamedTuple):
    """dy, the gradient w.r.t. a convolution's output y, from the gradient g w.r.t. what comes after y's batch norm.

    mask: a ReLU's mask (layout.pack_mask) that g is still to be multiplied with. Where y and statistics are given and
    the mask is not, g is w.r.t. relu(bn(y)), whose mask is recomputed from y. Without statistics dy is g * mask.
    Both sums None: the statistics are the running ones. bn_coeffs, dy_coeffs: ``make_bn_coeffs`` and
    ``make_dy_coeffs``, a cache; results do not depend on whether they are given.
    """

    g: Tensor
    mask: Tensor | None = None
    y: Tensor | None = None
    mean: Tensor | None = None
    invstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    sum_dz: Tensor | None = None
    sum_dz_xhat: Tensor | None = None
    bn_coeffs: Tensor | None = None
    dy_coeffs: Tensor | None = None


class DgradFactors(NamedTuple):
    """What the gradient w.r.t. a folded convolution's input is computed from: dz scaled + c matrix^T + vector.

    All None where there is no such convolution; matrix and vector also where the statistics are the running ones.
    """

    scaled: Tensor | None = None  # (N, K, 1, 1), the weight times the batch norm's scale
    matrix: Tensor | None = None  # (K, K, 1, 1)
    vector: Tensor | None = None  # (K,)


def make_bn_coeffs(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(3, C) scale, bias and offset: a batch norm is (y - mean) * scale + bias, and also y * scale + offset."""
    scale = invstd if weight is None else invstd * weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return torch.stack([scale, bias, (bias - mean.double() * scale).to(mean.dtype)])


def make_dy_coeffs(
    sum_dz: Tensor, sum_dz_xhat: Tensor, mean: Tensor, invstd: Tensor, bn_coeffs: Tensor, pixels: int
) -> Tensor:
    """(3, C) slope, level and offset of the gradient w.r.t. a batch norm's input y.

    dy = dz * scale - level - (y - mean) * slope, and also dz * scale - (y * slope + offset).

    Args:
        sum_dz, sum_dz_xhat, mean, invstd: (C,).
        bn_coeffs: (3, C), ``make_bn_coeffs`` of the batch norm.
        pixels: of y, N * H * W.
    """
    factor = bn_coeffs[0].double() / max(pixels, 1)
    slope = (factor * invstd * sum_dz_xhat).to(mean.dtype)
    level = factor * sum_dz
    # Of the slope as it is rounded: what rounding loses is then multiplied with y - mean, not with y.
    return torch.stack([slope, level.to(mean.dtype), (level - mean.double() * slope).to(mean.dtype)])
