"""Mean and covariance of an activation's channels over its pixels: a^T a, of which only the upper half is computed.

A program computes one of the tiles BLOCK_N x BLOCK_N of the upper triangle from one split of the pixels.
reductions.covariance_of merges the splits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_arguments,
    new_sums,
    precision,
    size_arguments,
    subsampled_bytes,
    subsampled_size,
)
from resnet_fused.kernels.autotune.heuristics import sum_configs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.kernels.tiles import (
    advance_pixels,
    apply_activation,
    load_activation_coeffs,
    load_tile,
    runtime_zero,
    store_tile,
    unravel_pixels,
)
from resnet_fused.types import Activation, Pair


@triton.jit
def input_covariance_kernel(
    x,  # (N, height, width, channels)
    x_mean,  # (channels,) or None
    x_bn_coeffs,  # (3, channels) or None
    x_shift,  # (channels,) or None
    partial_sums,  # (splits, channels * channels + channels) float32: a^T a, upper half, and the sums of a
    height,
    width,
    channels,
    out_height,  # of the subsampled pixels
    out_width,
    pixels,  # N * out_height * out_width
    input_stride_h,
    input_stride_w,
    POINTWISE: tl.constexpr,  # input strides of 1
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # channels, of rows and of columns
    ONE_TILE: tl.constexpr,  # whether BLOCK_N has all channels
):
    # The n-th tile of the upper triangle, row i and column j: column j has the tiles 0..j.
    if ONE_TILE:
        i, j = 0, 0
    else:
        n = tl.program_id(0)
        j = ((tl.sqrt(8.0 * n.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        j += ((j + 1) * (j + 2) // 2 <= n).to(tl.int32)
        j -= (j * (j + 1) // 2 > n).to(tl.int32)
        i = n - j * (j + 1) // 2
    row_offs = i * BLOCK_N + tl.arange(0, BLOCK_N)
    column_offs = j * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(pixels, BLOCK_M), tl.num_programs(1))
    start = tl.program_id(1) * steps * BLOCK_M
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    activation = (x, x_mean, x_bn_coeffs, x_shift)
    center, scale, offset, shift = load_activation_coeffs(activation, row_offs, channels)
    zero = runtime_zero(pixels)
    row_coeffs = (center, scale + zero, offset, shift + zero)
    column_coeffs = load_activation_coeffs(activation, column_offs, channels)
    if not POINTWISE:
        image, h, w = unravel_pixels(start + tl.arange(0, BLOCK_M), out_height, out_width)
        step_images, step_h, step_w = unravel_pixels(BLOCK_M, out_height, out_width)
    for step in range(steps):
        pixel_offs = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel_valid = pixel_offs < pixels
        x_offs = pixel_offs
        if not POINTWISE:
            x_offs = (image * height + h * input_stride_h) * width + w * input_stride_w
        value = load_tile(x, x_offs, pixel_valid, column_offs, channels)
        b = apply_activation(value, activation, column_coeffs, pixel_valid, True)
        a = b
        if not ONE_TILE:
            value = load_tile(x, x_offs, pixel_valid, row_offs, channels)
            a = apply_activation(value, activation, row_coeffs, pixel_valid, False)
        total += tl.sum(b.to(tl.float32), 0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if not POINTWISE:
            image, h, w = advance_pixels(image, h, w, step_images, step_h, step_w, out_height, out_width)
    split_sums = partial_sums + tl.program_id(1) * (channels * channels + channels)
    store_tile(split_sums, acc, row_offs, row_offs < channels, column_offs, channels)
    tl.store(split_sums + channels * channels + column_offs, total, (column_offs < channels) & (i == 0))


def configs(a: Activation, input_stride: Pair) -> list[Config]:
    height, width = subsampled_size(a.x, input_stride)
    channels = a.x.shape[1]
    return sum_configs(a.x, a.x.shape[0] * height * width, channels, channels, square=True)


def input_covariance(a: Activation, input_stride: Pair, config: Config) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased covariance (C, C) of ``a`` over every input_stride-th pixel, float32.

    Args:
        a: (N, C, H, W), channels_last.
    """
    x = a.x
    channels, (height, width) = x.shape[1], subsampled_size(x, input_stride)
    pixels, tiles = x.shape[0] * height * width, cdiv(channels, config.block_n)
    partial_sums = new_sums(x, config.splits, channels * channels + channels)
    Launch(
        input_covariance_kernel,
        (tiles * (tiles + 1) // 2, config.splits),
        {
            **activation_arguments(a), "partial_sums": partial_sums,
            **size_arguments(x), "out_height": height, "out_width": width, "pixels": pixels,
            "input_stride_h": input_stride[0], "input_stride_w": input_stride[1],
        },
        {
            "POINTWISE": input_stride == (1, 1), "PRECISION": precision(x.dtype), "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n, "ONE_TILE": tiles == 1,
        },
        config,
        flops=2 * pixels * channels * channels,
        partial_bytes=subsampled_bytes(height, width, x=x),
    ).start()  # fmt: skip
    return reductions.covariance_of(partial_sums, channels, pixels)
