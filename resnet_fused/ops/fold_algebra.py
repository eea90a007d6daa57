"""The algebra per channel of a folded convolution, between the passes over pixels. See docs/training-fold.md.

With c the centered input, W the weight, t = -mean of c W^T and P the pixels:

    forward    mean and S of c;  var = diag(W S W^T);  z = scale (W c + t) + beta
    backward   Q = dz^T c;  dbeta = sum dz;  dgamma = invstd (diag(W Q^T) + dbeta t)
               dy = scale (dz + slope (W c + t) + offset),  slope = -invstd dgamma / P,  offset = -dbeta / P
               dW = dy^T c,  dc = dy W: both from Q, S and the sums, without y
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.ops import _checks
from resnet_fused.ops.bn_stats import shared_sums
from resnet_fused.ops.dispatch import runs_triton
from resnet_fused.ops.registry import register_op
from resnet_fused.ops.vendor_gemm import matrix_mm_nt, matrix_mm_tn
from resnet_fused.reference import folded_conv_bn as reference
from resnet_fused.types import BatchStats, InputCovariance


@functools.cache
def _kernels() -> ModuleType:
    from resnet_fused.kernels import fold_algebra

    return fold_algebra


def _fold_statistics(
    weight: Tensor, mean: Tensor, covariance: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runs_triton(weight):
        results: tuple[Tensor, Tensor, Tensor, Tensor]
        results = _kernels().fold_statistics(weight, mean, covariance, shift, eps)
        return results
    wide = weight.to(mean.dtype)
    var = (matrix_mm_nt(wide, covariance).double() * wide).sum(1).clamp_min_(0).to(wide.dtype)
    mean_y = wide @ mean
    true_mean = mean_y.clone() if shift is None else mean_y + wide @ shift
    return mean_y, true_mean, var, torch.rsqrt(var + eps)


#: Statistics of y = c W^T from those of c: means of c W^T and of (c + shift) W^T, biased variance and invstd.
fold_statistics = register_op(
    "fold_statistics(Tensor weight, Tensor mean, Tensor covariance, Tensor? shift, float eps)"
    " -> (Tensor mean_y, Tensor true_mean, Tensor var, Tensor invstd)",
    reference.fold_statistics,
    lambda weight, mean, *_: tuple(mean.new_empty(weight.shape[0]) for _ in range(4)),
    _fold_statistics,
    triton=True,
    check=_checks.fold_statistics,
)


def _rectified_mean(weight: Tensor, bias: Tensor) -> Tensor:
    mean: Tensor = (_kernels() if runs_triton(weight) else reference).rectified_mean(weight, bias)
    return mean


#: E[relu(bias + weight * g)], g a standard normal: near the mean of relu(bn(y)), and known before y is.
rectified_mean = register_op(
    "rectified_mean(Tensor weight, Tensor bias) -> Tensor",
    reference.rectified_mean,
    lambda weight, bias: weight.new_empty(weight.shape),
    _rectified_mean,
    triton=True,
    check=_checks.rectified_mean,
)

FoldGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fold_gradients(
    weight: Tensor,
    gamma: Tensor | None,
    stats: BatchStats,
    fold: InputCovariance,
    sum_dz: Tensor,
    q: Tensor,
    pixels: int,
) -> FoldGradients:
    if not runs_triton(weight):
        return fold_gradients_across(weight, gamma, stats, fold, sum_dz, q, pixels, None)
    *results, matrix, vector = _kernels().fold_gradients(weight, gamma, stats, fold, sum_dz, q, pixels)
    dweight, dgamma, scaled = results
    if matrix is None:
        return dweight, dgamma, scaled, weight.new_empty(0), dweight.new_empty(0)
    return dweight, dgamma, scaled, matrix, vector


def _fake_fold_gradients(
    weight: Tensor, gamma: Tensor | None, stats: BatchStats, fold: InputCovariance, *_: Any
) -> FoldGradients:
    (n, k), wide = weight.shape, stats.mean
    matrix = (0,) if fold.mean is None else (k, k)
    dweight, dgamma, vector = wide.new_empty(n, k), wide.new_empty(n), wide.new_empty(matrix[:1])
    return dweight, dgamma, weight.new_empty(n, k), weight.new_empty(matrix), vector


def _gradients_operands(weight: Tensor, gamma: Tensor | None, *args: Any) -> tuple[Any, ...]:
    mean_y, invstd, mean, covariance, *sums = args
    return weight, gamma, BatchStats(mean_y, invstd), InputCovariance(None, mean, covariance), *sums


#: Gradients of a folded convolution's parameters, and what dc = dz scaled + c matrix^T + vector is computed from.
fold_gradients = register_op(
    "fold_gradients(Tensor weight, Tensor? gamma, Tensor mean_y, Tensor invstd, Tensor? mean, Tensor? covariance,"
    " Tensor sum_dz, Tensor q, SymInt pixels)"
    " -> (Tensor dweight, Tensor dgamma, Tensor scaled, Tensor matrix, Tensor vector)",
    reference.fold_gradients,
    _fake_fold_gradients,
    _fold_gradients,
    triton=True,
    check=_checks.fold_gradients,
    operands=_gradients_operands,
)


def fold_gradients_across(
    weight: Tensor,
    gamma: Tensor | None,
    stats: BatchStats,
    fold: InputCovariance,
    sum_dz: Tensor,
    q: Tensor,
    pixels: int,
    group: dist.ProcessGroup | None,
) -> FoldGradients:
    """``fold_gradients`` of statistics that a group of processes may share; no op, since it reduces across the group.

    Args:
        weight: W, (N, K), in the activations' dtype.
        stats: of y - shift W^T; fold: of this process's input.
        pixels: P of this process.
    """
    wide, factor = weight.to(sum_dz.dtype), stats.invstd if gamma is None else stats.invstd * gamma
    scaled = (factor[:, None] * wide).to(weight.dtype)
    along_y = (wide.double() * q).sum(1).to(wide.dtype) - sum_dz * stats.mean
    dgamma = stats.invstd * along_y
    if fold.covariance is None or fold.mean is None:
        return factor[:, None] * q, dgamma, scaled, weight.new_empty(0), q.new_empty(0)
    shared_dz, shared_dgamma = shared_sums((sum_dz, dgamma), group, stats.count_fraction)
    slope, offset = -stats.invstd * shared_dgamma / pixels, -shared_dz / pixels
    dweight = q + (slope * pixels)[:, None] * matrix_mm_nt(wide, fold.covariance)
    if group is not None:  # else c W^T has the mean that was subtracted from it, and dy sums to zero
        offset = offset + slope * (wide @ fold.mean - stats.mean)
    total = offset * pixels
    if group is not None and fold.shift is not None:
        dweight = dweight.addr(sum_dz + total, fold.shift)
    dweight = factor[:, None] * dweight.addr(total, fold.mean)
    matrix = matrix_mm_tn(wide, (factor * slope)[:, None] * wide).to(weight.dtype)
    # Of both matrices as they are rounded: then dc sums to zero over the pixels as dy does.
    vector = offset @ scaled.to(wide.dtype) - matrix.to(wide.dtype) @ fold.mean
    return dweight, dgamma, scaled, matrix, vector
