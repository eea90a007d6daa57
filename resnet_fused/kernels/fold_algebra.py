"""Gradients of a folded 1x1 convolution and its batch norm, once the sums over the pixels are known.

Two launches, with the one of fold_statistics, replace some forty small ones. The formulas are those of
ops.fold_algebra. Sums in which large terms cancel (dgamma, the vector) are computed in float64, since they are short.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.autotune.heuristics import tile
from resnet_fused.kernels.bn_coeffs import rectified_mean
from resnet_fused.kernels.fold_statistics import (
    float32_precision,
    fold_statistics,
    load_matrix,
    weight_covariance,
)
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.types import BatchStats, InputCovariance

__all__ = ["fold_gradients", "fold_statistics", "rectified_mean"]


@triton.jit
def _scale(gamma, invstd, output_offs, output_valid):
    """gamma * invstd of some outputs; gamma: (outputs,) or None; invstd: values (BLOCK,)."""
    if gamma is not None:
        invstd *= tl.load(gamma + output_offs, output_valid, 0.0)
    return invstd


@triton.jit
def fold_dweight_kernel(
    weight,  # (outputs, channels)
    gamma,  # (outputs,) float32 or None
    mean_y,  # (outputs,) float32
    invstd,  # (outputs,) float32
    mean,  # (channels,) float32 or None
    covariance,  # (channels, channels) float32 or None
    sum_dz,  # (outputs,) float32
    q,  # (outputs, channels) float32
    dweight,  # (outputs, channels) float32
    dgamma,  # (outputs,) float32
    scaled,  # (outputs, channels) in the dtype of weight
    outputs,
    channels,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # outputs
    BLOCK_N: tl.constexpr,  # channels
    BLOCK_K: tl.constexpr,  # channels, of the sums
):
    # Tiles of the same outputs are neighbors, since they read the same rows.
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    output_offs = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_offs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    output_valid = output_offs < outputs
    # Every tile of a row computes the row's dgamma, which costs less than another launch.
    w_dot_q = tl.zeros((BLOCK_M, BLOCK_K), tl.float64)
    for first in range(0, channels, BLOCK_K):
        inner_offs = first + tl.arange(0, BLOCK_K)
        w = load_matrix(weight, output_offs, inner_offs, outputs, channels)
        q_tile = load_matrix(q, output_offs, inner_offs, outputs, channels)
        w_dot_q += w.to(tl.float64) * q_tile.to(tl.float64)
    sum_dz_value = tl.load(sum_dz + output_offs, output_valid, 0.0)
    center = tl.load(mean_y + output_offs, output_valid, 0.0)
    invstd_value = tl.load(invstd + output_offs, output_valid, 0.0)
    centered = tl.sum(w_dot_q, 1) - sum_dz_value.to(tl.float64) * center.to(tl.float64)
    dgamma_value = (centered * invstd_value.to(tl.float64)).to(tl.float32)
    tl.store(dgamma + output_offs, dgamma_value, output_valid & (tile_n == 0))
    value = load_matrix(q, output_offs, channel_offs, outputs, channels)
    if covariance is not None:
        acc = weight_covariance(
            weight, covariance, output_offs, channel_offs, outputs, channels, PRECISION, BLOCK_K
        )
        m = tl.load(mean + channel_offs, channel_offs < channels, 0.0)
        value = value - sum_dz_value[:, None] * m[None, :] - (invstd_value * dgamma_value)[:, None] * acc
    factor = _scale(gamma, invstd_value, output_offs, output_valid)[:, None]
    valid = output_valid[:, None] & (channel_offs < channels)[None, :]
    offs = output_offs[:, None] * channels + channel_offs[None, :]
    tl.store(dweight + offs, factor * value, valid)
    w = load_matrix(weight, output_offs, channel_offs, outputs, channels)
    tl.store(scaled + offs, (factor * w).to(scaled.dtype.element_ty), valid)


@triton.jit
def _scale_and_slope(gamma, invstd, dgamma, output_offs, output_valid, pixels):
    """scale and slope = -invstd dgamma / P of some outputs; gamma: (outputs,) or None; invstd, dgamma: (outputs,)."""
    invstd_value = tl.load(invstd + output_offs, output_valid, 0.0)
    slope = -invstd_value * tl.load(dgamma + output_offs, output_valid, 0.0) / pixels
    return _scale(gamma, invstd_value, output_offs, output_valid), slope


@triton.jit
def fold_matrix_kernel(
    weight,  # (outputs, channels)
    gamma,  # (outputs,) float32 or None
    mean_y,  # (outputs,) float32
    invstd,  # (outputs,) float32
    sum_dz,  # (outputs,) float32
    dgamma,  # (outputs,) float32
    matrix,  # (channels, channels) in the dtype of weight
    vector,  # (channels,) float32
    outputs,
    channels,
    pixels,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # channels, rows of matrix
    BLOCK_N: tl.constexpr,  # channels, columns of matrix
    BLOCK_K: tl.constexpr,  # outputs
):
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    column_offs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile_m < tl.cdiv(channels, BLOCK_M):
        row_offs = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, outputs, BLOCK_K):
            output_offs = first + tl.arange(0, BLOCK_K)
            factor, slope = _scale_and_slope(
                gamma, invstd, dgamma, output_offs, output_offs < outputs, pixels
            )
            a = load_matrix(weight, output_offs, row_offs, outputs, channels)
            b = load_matrix(weight, output_offs, column_offs, outputs, channels) * (factor * slope)[:, None]
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        tl.store(
            matrix + row_offs[:, None] * channels + column_offs[None, :],
            acc.to(matrix.dtype.element_ty),
            (row_offs < channels)[:, None] & (column_offs < channels)[None, :],
        )
    else:  # one more row of tiles, for the vector
        total = tl.zeros((BLOCK_N,), tl.float64)
        for first in range(0, outputs, BLOCK_K):
            output_offs = first + tl.arange(0, BLOCK_K)
            output_valid = output_offs < outputs
            factor, slope = _scale_and_slope(gamma, invstd, dgamma, output_offs, output_valid, pixels)
            offset = -tl.load(sum_dz + output_offs, output_valid, 0.0) / pixels
            center = tl.load(mean_y + output_offs, output_valid, 0.0).to(tl.float64)
            w = load_matrix(weight, output_offs, column_offs, outputs, channels) * factor[:, None]
            # Of the scaled weight as it is rounded: then dz scaled + vector sums to zero over the pixels.
            scaled = w.to(matrix.dtype.element_ty).to(tl.float64)
            along_y = w.to(tl.float64) * (slope.to(tl.float64) * center)[:, None]
            total += tl.sum(scaled * offset.to(tl.float64)[:, None] - along_y, 0)
        tl.store(vector + column_offs, total.to(tl.float32), column_offs < channels)


def fold_gradients(
    weight: Tensor,
    gamma: Tensor | None,
    stats: BatchStats,
    fold: InputCovariance,
    sum_dz: Tensor,
    q: Tensor,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the parameters, and what dc = dz scaled + c matrix^T + vector is computed from.

        dgamma  = invstd (diag(W Q^T) - sum_dz mean_y)
        dweight = scale (Q - invstd dgamma (W S) - sum_dz mean^T)
        matrix  = W^T diag(scale slope) W,  slope = -invstd dgamma / P
        vector  = (scale (-sum_dz / P - slope mean_y)) W
        scaled  = scale W

    See docs/training-fold.md. Statistics are of this process's pixels alone. Two launches; one for running statistics,
    where dweight = scale Q.

    Args:
        weight: W, (N, K), float32, bfloat16 or float16; gamma: (N,) float32 or None.
        stats: of c W^T, (N,) float32.
        fold: mean, (K,), and covariance S, (K, K), float32, of c; None for running statistics.
        sum_dz: (N,); q: Q = dz^T c, (N, K); float32.
        pixels: P.

    Returns:
        dweight: (N, K), dgamma: (N,), float32; scaled: (N, K) and matrix: (K, K), in the weight's dtype; vector: (K,),
        float32. matrix and vector are None for running statistics.
    """
    w = weight.contiguous()
    outputs, channels = w.shape
    sizes = {"outputs": outputs, "channels": channels}
    is_running, is_float32 = fold.covariance is None, w.dtype == torch.float32
    # Without tensor cores operands are held in registers, and larger tiles would spill.
    config = Config(16 if is_float32 else 32, tile(channels, 64), tile(channels, 32))
    dweight, dgamma = q.new_empty(outputs, channels), q.new_empty(outputs)
    scaled = torch.empty_like(w)
    Launch(
        fold_dweight_kernel,
        (cdiv(outputs, config.block_m) * cdiv(channels, config.block_n),),
        {
            "weight": w, "gamma": gamma, "mean_y": stats.mean, "invstd": stats.invstd,
            "mean": fold.mean, "covariance": fold.covariance, "sum_dz": sum_dz,
            "q": q.contiguous(), "dweight": dweight, "dgamma": dgamma, "scaled": scaled, **sizes,
        },
        {"PRECISION": float32_precision(w.dtype), **config.blocks()},
        config,
        flops=2 * outputs * channels * (2 if is_running else channels + 3),
    ).start()  # fmt: skip
    if is_running:
        return dweight, dgamma, scaled, None, None
    config = Config(tile(channels, 32), tile(channels, 64), tile(outputs, 32 if is_float32 else 64))
    matrix, vector = w.new_empty(channels, channels), q.new_empty(channels)
    # The matrix of a 16-bit weight is rounded anyway: TF32 has the range of float32.
    Launch(
        fold_matrix_kernel,
        ((cdiv(channels, config.block_m) + 1) * cdiv(channels, config.block_n),),
        {
            "weight": w, "gamma": gamma, "mean_y": stats.mean, "invstd": stats.invstd, "sum_dz": sum_dz,
            "dgamma": dgamma, "matrix": matrix, "vector": vector, **sizes, "pixels": pixels,
        },
        {"PRECISION": "ieee" if is_float32 else "tf32", **config.blocks()},
        config,
        flops=2 * outputs * channels * (channels + 1),
    ).start()  # fmt: skip
    return dweight, dgamma, scaled, matrix, vector
