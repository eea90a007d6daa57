"""Statistics of a folded 1x1 convolution's output y = c W^T from those of its centered input c.

With W, (N, K), the weight and S the covariance of c. The sums that give the variances cancel, and are computed in
float64, since they are short; GEMMs with S use tensor cores with the accuracy of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.autotune.heuristics import tile
from resnet_fused.kernels.launch import Config, Launch, cdiv

#: Channels from which the columns of W S are split over programs; with fewer the loop has at most 8 steps.
SPLIT_FROM = 256


@triton.jit
def load_matrix(matrix, row_offs, column_offs, rows, columns):
    """A tile of a matrix (rows, columns), float32; 0 outside."""
    valid = (row_offs < rows)[:, None] & (column_offs < columns)[None, :]
    pointers = matrix + row_offs[:, None] * columns + column_offs[None, :]
    return tl.load(pointers, valid, other=0.0).to(tl.float32)


@triton.jit
def weight_covariance(
    weight,  # (outputs, channels)
    covariance,  # (channels, channels)
    output_offs,  # (BLOCK,)
    channel_offs,  # (BLOCK,)
    outputs,
    channels,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of W S, (outputs, channels) float32."""
    acc = tl.zeros((output_offs.shape[0], channel_offs.shape[0]), tl.float32)
    for first in range(0, channels, BLOCK_K):
        inner_offs = first + tl.arange(0, BLOCK_K)
        w = load_matrix(weight, output_offs, inner_offs, outputs, channels)
        s = load_matrix(covariance, inner_offs, channel_offs, channels, channels)
        acc = tl.dot(w, s, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_statistics(
    centered_mean,  # (BLOCK,) float64, values; so are the next two
    variance,
    shift_mean,
    mean_y,  # (outputs,) float32, and the next three
    true_mean,
    var,
    invstd,
    eps,
    output_offs,  # (BLOCK,)
    output_valid,  # (BLOCK,)
):
    # Not tl.maximum: a NaN stays NaN.
    variance = tl.where(variance < 0, 0.0, variance).to(tl.float32)
    tl.store(mean_y + output_offs, centered_mean.to(tl.float32), output_valid)
    tl.store(true_mean + output_offs, (centered_mean + shift_mean).to(tl.float32), output_valid)
    tl.store(var + output_offs, variance, output_valid)
    tl.store(invstd + output_offs, tl.rsqrt(variance + eps), output_valid)


@triton.jit
def fold_statistics_kernel(
    weight,  # (outputs, channels)
    mean,  # (channels,) float32
    covariance,  # (channels, channels) float32
    shift,  # (channels,) float32 or None
    partial_sums,  # (3, splits, outputs) float64 where columns of S are split over programs; or None
    mean_y,  # (outputs,) float32
    true_mean,  # (outputs,) float32
    var,  # (outputs,) float32
    invstd,  # (outputs,) float32
    eps,
    outputs,
    channels,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # outputs
    BLOCK_N: tl.constexpr,  # columns of S
    BLOCK_K: tl.constexpr,  # rows of S
):
    output_offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    centered_mean = tl.zeros((BLOCK_M,), tl.float64)
    variance = tl.zeros((BLOCK_M,), tl.float64)
    shift_mean = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(tl.program_id(1) * BLOCK_N, channels, tl.num_programs(1) * BLOCK_N):
        channel_offs = start + tl.arange(0, BLOCK_N)
        channel_valid = channel_offs < channels
        acc = weight_covariance(
            weight, covariance, output_offs, channel_offs, outputs, channels, PRECISION, BLOCK_K
        )
        w = load_matrix(weight, output_offs, channel_offs, outputs, channels).to(tl.float64)
        m = tl.load(mean + channel_offs, channel_valid, 0.0).to(tl.float64)
        centered_mean += tl.sum(w * m[None, :], 1)
        variance += tl.sum(w * acc.to(tl.float64), 1)
        if shift is not None:
            shift_value = tl.load(shift + channel_offs, channel_valid, 0.0).to(tl.float64)
            shift_mean += tl.sum(w * shift_value[None, :], 1)
    output_valid = output_offs < outputs
    if partial_sums is None:
        _store_statistics(
            centered_mean, variance, shift_mean, mean_y, true_mean, var, invstd, eps, output_offs, output_valid
        )  # fmt: skip
    else:
        pointers = partial_sums + tl.program_id(1) * outputs + output_offs
        size = tl.num_programs(1) * outputs
        tl.store(pointers, centered_mean, output_valid)
        tl.store(pointers + size, variance, output_valid)
        tl.store(pointers + 2 * size, shift_mean, output_valid)


@triton.jit
def merge_statistics_kernel(
    partial_sums,  # (3, splits, outputs) float64
    mean_y,  # (outputs,) float32
    true_mean,  # (outputs,) float32
    var,  # (outputs,) float32
    invstd,  # (outputs,) float32
    eps,
    splits,
    outputs,
    SPLITS: tl.constexpr,  # at least splits
    BLOCK: tl.constexpr,  # outputs
):
    output_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    valid = (split < splits)[:, None] & (output_offs < outputs)[None, :]
    pointers = partial_sums + split[:, None] * outputs + output_offs[None, :]
    size = splits * outputs
    centered_mean = tl.sum(tl.load(pointers, valid, other=0.0), 0)
    variance = tl.sum(tl.load(pointers + size, valid, other=0.0), 0)
    shift_mean = tl.sum(tl.load(pointers + 2 * size, valid, other=0.0), 0)
    _store_statistics(
        centered_mean, variance, shift_mean, mean_y, true_mean, var, invstd, eps, output_offs, output_offs < outputs
    )  # fmt: skip


def float32_precision(dtype: torch.dtype) -> str:
    """input_precision with the accuracy of float32; on tensor cores where the activations have 16 bits."""
    return "ieee" if dtype == torch.float32 else "tf32x3"


def fold_statistics(
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of y = c W^T from those of c; see reference.folded_conv_bn.fold_statistics.

    One launch; two where W S has so many steps that its columns are split over programs.

    Args:
        weight: W, (N, K), float32, bfloat16 or float16.
        mean, covariance: (K,) and S, (K, K), float32, contiguous.
        shift: (K,) float32, subtracted from the convolution's input to get c.

    Returns:
        mean_y = W mean; true_mean, the mean of (c + shift) W^T; var = max(diag(W S W^T), 0);
        invstd = 1 / sqrt(var + eps): (N,) each, float32.
    """
    w = weight.contiguous()
    outputs, channels = w.shape
    split = channels >= SPLIT_FROM
    # More rows read S fewer times; float32 GEMMs hold their operands in registers, where more would spill.
    config = Config(32 if split and w.dtype != torch.float32 else 16, tile(channels, 64), tile(channels, 32))
    splits = cdiv(channels, config.block_n) if split else 1
    partial_sums = None if splits == 1 else mean.new_empty(3, splits, outputs, dtype=torch.float64)
    results = {name: mean.new_empty(outputs) for name in ("mean_y", "true_mean", "var", "invstd")}
    Launch(
        fold_statistics_kernel,
        (cdiv(outputs, config.block_m), splits),
        {
            "weight": w, "mean": mean, "covariance": covariance, "shift": shift,
            "partial_sums": partial_sums, **results, "eps": eps, "outputs": outputs, "channels": channels,
        },
        {"PRECISION": float32_precision(w.dtype), **config.blocks()},
        config,
        flops=2 * outputs * channels * (channels + 2),
    ).start()  # fmt: skip
    if partial_sums is not None:
        block = 128
        Launch(
            merge_statistics_kernel,
            (cdiv(outputs, block),),
            {"partial_sums": partial_sums, **results, "eps": eps, "splits": splits, "outputs": outputs},
            {"SPLITS": 1 << (splits - 1).bit_length(), "BLOCK": block},
            Config(warps=4, stages=1),
        ).start()
    return results["mean_y"], results["true_mean"], results["var"], results["invstd"]
