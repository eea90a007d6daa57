"""A convolution and the batch norm behind it, as one of the two sums that meet at the end of a block.

It is either *folded*, so that the output of the convolution exists only piece by piece, or *plain*. With c the centred
input of a folded convolution, W its weight, t = -mean of c W^T and P the pixels:

    forward    mean and S of c;  var = diag(W S W^T);  z = scale (W c + t) + beta
    backward   Q = dz^T c;  dbeta = sum dz;  dgamma = invstd (diag(W Q^T) + dbeta t)
               dy = scale (dz + slope (W c + t) + offset),  slope = -invstd dgamma / P,  offset = -dbeta / P
               dW = dy^T c,  dc = dy W: both from Q, S and the sums, without y
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.ops._matmul import product as matrix_product
from resnet_fused.ops._matmul import transposed_product
from resnet_fused.ops.batch_norm_stats import (
    Norm,
    Statistics,
    batch_norm_stats,
    check_pixels,
    merge_across,
    shared_sums,
)
from resnet_fused.ops.folded import gram
from resnet_fused.reference.batch_norm import scale
from resnet_fused.reference.layout import statistics_dtype

Pair = tuple[int, int]


class ConvNorm(NamedTuple):
    """A convolution without bias, weight (N, K / groups, kh, kw), and the batch norm behind it."""

    weight: Tensor
    norm: Norm
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


def convolved_shape(shape: Sequence[int], convs: Sequence[ConvNorm]) -> tuple[int, ...] | None:
    """(N, C, H, W) behind some convolutions, one after the other; None if they do not fit."""
    n, channels, *size = shape
    for conv in convs:
        outputs, inputs, *kernel = conv.weight.shape
        if inputs * conv.groups != channels:
            return None
        channels = outputs
        size = [
            (size[i] + 2 * conv.padding[i] - conv.dilation[i] * (kernel[i] - 1) - 1) // conv.stride[i] + 1
            for i in range(2)
        ]
        if min(size) < 1:
            return None
    return n, channels, *size


#: Multiplications per element of its output that folding a 1x1 convolution may cost beside those of the convolution.
#: Measured on a CPU, see docs/training-fold.md: what they take is what the passes that folding saves would have taken.
FOLD_LIMIT = 300
#: With few pixels dy is what little the batch norm leaves of dz: terms that cancel should not be rounded one by one.
FOLD_PIXELS = 32


def folds(part: ConvNorm, pixels: int, fused: bool = False) -> bool:
    """Whether a convolution at the end of a block is folded: a 1x1 that does not contract, and where it pays.

    It always pays where folding takes no passes of its own (``fused``). Else, with K inputs, N outputs and P pixels, it
    takes P K^2 multiplications for the covariance and as many for its part of dc, and three times N K^2 for the
    variances, dW and W^T diag W.
    """
    n, k, *kernel = part.weight.shape
    if (
        kernel != [1, 1]
        or part.groups != 1
        or part.padding != (0, 0)
        or k > n
        or not _always(pixels >= FOLD_PIXELS)
    ):
        return False
    return fused or _always(k * k * (2 * pixels + 3 * n) <= FOLD_LIMIT * pixels * n)


def _always(condition: bool) -> bool:
    """A condition on sizes that torch.compile must not guard on: False unless it holds for every size there may be."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


class Stage(NamedTuple):
    """What of a ConvNorm is not differentiated.

    ``every``: the pixels that are taken before the convolution, one of so many down and across, instead of the stride
    of a 1x1. ``frozen``: the statistics to use; None: the batch's.
    """

    every: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    eps: float
    group: dist.ProcessGroup | None
    frozen: Statistics | None
    folded: bool = False


class Measured(NamedTuple):
    """Statistics of a batch norm, for use in this step and for the running ones."""

    used: Statistics
    running: tuple[Tensor, ...]  # mean and biased variance; empty where the statistics are frozen
    total: int | Tensor = 0  # pixels that these were taken over


def measure(y: Tensor, stage: Stage) -> Measured:
    """Statistics of a plain convolution's output."""
    if stage.frozen is not None:
        return Measured(stage.frozen, ())
    check_pixels(y.shape, stage.group)
    mean, var, invstd = batch_norm_stats(y, stage.eps)
    return settled(mean, mean, var, invstd, y.numel() // y.shape[1], stage)


class Fold(NamedTuple):
    """What backward needs of a folded convolution beside its input; all None where the statistics are frozen."""

    shift: Tensor | None  # (K,): c = input - shift
    mean: Tensor | None  # (K,), of c
    covariance: Tensor | None  # (K, K), of c


NO_FOLD = Fold(None, None, None)


def measure_folded(c: Tensor, weight: Tensor, shift: Tensor | None, stage: Stage) -> tuple[Measured, Fold]:
    """Statistics of c W^T before it is computed; the running mean is that of (c + shift) W^T.

    Args:
        c: (N, K, H, W); weight: (N, K) in its dtype; shift: (K,) or None.
    """
    if stage.frozen is not None:
        return Measured(stage.frozen, ()), NO_FOLD
    check_pixels((c.shape[0], len(weight), *c.shape[2:]), stage.group)
    wide = weight.to(statistics_dtype(c.dtype))
    mean_c, covariance = gram(c)
    return settle_folded(wide, mean_c, covariance, c.numel() // c.shape[1], shift, stage)


def settle_folded(
    wide: Tensor, mean_c: Tensor, covariance: Tensor, pixels: int, shift: Tensor | None, stage: Stage
) -> tuple[Measured, Fold]:
    """Statistics of c W^T from those of c; ``wide``: W, (N, K), in the statistics dtype."""
    var = (matrix_product(wide, covariance).double() * wide).sum(1).clamp_min_(0).to(wide.dtype)
    mean = wide @ mean_c
    true_mean = mean if shift is None else mean + wide @ shift
    invstd = torch.rsqrt(var + stage.eps)
    measured = settled(mean, true_mean, var, invstd, pixels, stage)
    return measured, Fold(shift, mean_c, covariance)


def settled(
    mean: Tensor, true_mean: Tensor, var: Tensor, invstd: Tensor, pixels: int, stage: Stage
) -> Measured:
    """The statistics, over all processes that share them. ``mean`` is relative to what ``true_mean`` is not."""
    share: Tensor | None = None
    total: int | Tensor = pixels
    merged = true_mean
    if stage.group is not None:
        merged, var, total = merge_across(stage.group, true_mean, var, pixels)
        mean, invstd = mean + (merged - true_mean), torch.rsqrt(var + stage.eps)
        share = pixels / total
    return Measured(Statistics(mean, invstd, share), (merged, var), total)


def moments(measured: Sequence[Measured]) -> list[Tensor]:
    """Of each in turn mean and unbiased variance, for the running statistics; nothing of those that are frozen."""
    live = [each for each in measured if each.running]
    means, variances = [each.running[0] for each in live], [each.running[1] for each in live]
    factors = [each.total / (each.total - 1) for each in live]
    plain = [factor for factor in factors if isinstance(factor, float)]
    unbiased: Sequence[Tensor]
    if live and len(plain) == len(live) and not torch.compiler.is_compiling():  # there factors may be symbols
        unbiased = torch._foreach_mul(variances, plain)  # one kernel on a GPU
    else:
        unbiased = [variance * factor for variance, factor in zip(variances, factors, strict=True)]
    return [moment for pair in zip(means, unbiased, strict=True) for moment in pair]


class FoldedGradients(NamedTuple):
    """Gradients of the weights, and dc = (part of folded_backward) + c matrix^T + vector; None: nothing to add."""

    weight: Tensor
    gamma: Tensor
    matrix: Tensor | None
    vector: Tensor | None


def folded_gradients(
    weight: Tensor,
    gamma: Tensor | None,
    used: Statistics,
    fold: Fold,
    stage: Stage,
    sum_dz: Tensor,
    product: Tensor,
    pixels: int,
) -> FoldedGradients:
    """What is left of backward once the sums over the pixels are known.

    Args:
        weight: (N, K), rounded to the activations' dtype; gamma: (N,); both in the statistics dtype.
        sum_dz: (N,); product: Q, (N, K); pixels: P.
    """
    factor = scale(used.invstd, gamma)
    along = (weight.double() * product).sum(1).to(weight.dtype) - sum_dz * used.mean
    dgamma = used.invstd * along
    if fold.covariance is None or fold.mean is None:
        return FoldedGradients(factor[:, None] * product, dgamma, None, None)
    shared_dz, shared_dgamma = shared_sums((sum_dz, dgamma), stage.group, used.share)
    slope, offset = -used.invstd * shared_dgamma / pixels, -shared_dz / pixels
    dweight = product + (slope * pixels)[:, None] * matrix_product(weight, fold.covariance)
    total = offset * pixels
    if stage.group is not None:  # else c W^T has the mean that was taken from it, and dy sums to zero
        total = total + slope * pixels * (weight @ fold.mean - used.mean)
        if fold.shift is not None:
            dweight = dweight.addr(sum_dz + total, fold.shift)
    dweight = factor[:, None] * dweight.addr(total, fold.mean)
    matrix = transposed_product(weight, (factor * slope)[:, None] * weight)
    vector = (factor * (offset - slope * used.mean)) @ weight
    return FoldedGradients(dweight, dgamma, matrix, vector)
