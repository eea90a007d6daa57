"""Products of all pairs of channels of an activation, summed over the pixels: c^T c, the upper half of its tiles.

Splits as in wgrad; ``reductions.covariance_of`` makes mean and covariance of what they have found.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_fields,
    input_sizes,
    new_float,
    precision,
    size_at,
    touched,
)
from resnet_fused.kernels.autotune.heuristics import sum_configs
from resnet_fused.kernels.launch import Config, cdiv, launch
from resnet_fused.kernels.tiles import (
    activated,
    activation_terms,
    pixel_of,
    pixels_later,
    tile_of,
    unknown_zero,
)
from resnet_fused.types import Activation, Pair


@triton.jit
def input_covariance_kernel(
    x,
    mean,
    bn_coeffs,
    shift,
    parts,
    HEIGHT,
    WIDTH,
    CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    PIXELS,
    STRIDE_H,
    STRIDE_W,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    # The n-th tile of the upper triangle: column j has tiles 0..j.
    if ONE_TILE:
        i, j = 0, 0
    else:
        pair = tl.program_id(0)
        j = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        j += ((j + 1) * (j + 2) // 2 <= pair).to(tl.int32)
        j -= (j * (j + 1) // 2 > pair).to(tl.int32)
        i = pair - j * (j + 1) // 2
    left = i * BLOCK_N + tl.arange(0, BLOCK_N)
    right = j * BLOCK_N + tl.arange(0, BLOCK_N)
    per_split = tl.cdiv(tl.cdiv(PIXELS, BLOCK_M), tl.num_programs(1))
    start = tl.program_id(1) * per_split * BLOCK_M
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    left_inside, right_inside = left < CHANNELS, right < CHANNELS
    centre_i, scale_i, offset_i, level_i = activation_terms(
        mean, bn_coeffs, shift, left, left_inside, CHANNELS, x.dtype.element_ty
    )
    zero = unknown_zero(PIXELS)
    scale_i, level_i = scale_i + zero, level_i + zero
    centre_j, scale_j, offset_j, level_j = activation_terms(
        mean, bn_coeffs, shift, right, right_inside, CHANNELS, x.dtype.element_ty
    )
    if not POINTWISE:
        image, h, w = pixel_of(start + tl.arange(0, BLOCK_M), OUT_HEIGHT, OUT_WIDTH)
        more_images, more_h, more_w = pixel_of(BLOCK_M, OUT_HEIGHT, OUT_WIDTH)
    for step in range(per_split):
        rows = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < PIXELS
        source = rows
        if not POINTWISE:
            source = (image * HEIGHT + h * STRIDE_H) * WIDTH + w * STRIDE_W
        value = tile_of(x, source, inside, right, right_inside, CHANNELS)
        b = activated(value, bn_coeffs, shift, centre_j, scale_j, offset_j, level_j, inside, True)
        a = b
        if not ONE_TILE:
            value = tile_of(x, source, inside, left, left_inside, CHANNELS)
            a = activated(value, bn_coeffs, shift, centre_i, scale_i, offset_i, level_i, inside, False)
        total += tl.sum(b.to(tl.float32), 0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if not POINTWISE:
            image, h, w = pixels_later(image, h, w, more_images, more_h, more_w, OUT_HEIGHT, OUT_WIDTH)
    part = parts + tl.program_id(1) * (CHANNELS * CHANNELS + CHANNELS)
    inside = (left < CHANNELS)[:, None] & (right < CHANNELS)[None, :]
    tl.store(part + left[:, None] * CHANNELS + right[None, :], acc, inside)
    tl.store(part + CHANNELS * CHANNELS + right, total, (right < CHANNELS) & (i == 0))


def configs(source: Activation, input_stride: Pair) -> list[Config]:
    height, width = size_at(source.x, input_stride)
    channels = source.x.shape[1]
    return sum_configs(source.x, source.x.shape[0] * height * width, channels, channels, square=True)


def input_covariance(source: Activation, input_stride: Pair, config: Config) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased covariance (C, C) of an activation's channels over its pixels, float32.

    Args:
        source: (N, C, H, W), channels_last.
        every: of the pixels one in so many, down and across.
    """
    source, x = reductions.with_bn_coeffs(source), source.x
    channels, (height, width) = x.shape[1], size_at(x, input_stride)
    pixels, tiles = x.shape[0] * height * width, cdiv(channels, config.block_n)
    parts = new_float(x, config.splits, channels * channels + channels)
    launch(
        input_covariance_kernel,
        (tiles * (tiles + 1) // 2, config.splits),
        {
            **activation_fields(source), "parts": parts,
            **input_sizes(x), "OUT_HEIGHT": height, "OUT_WIDTH": width, "PIXELS": pixels,
            "STRIDE_H": input_stride[0], "STRIDE_W": input_stride[1],
        },
        {
            "POINTWISE": input_stride == (1, 1), "PRECISION": precision(x.dtype), "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n, "ONE_TILE": tiles == 1,
        },
        config,
        flops=2 * pixels * channels * channels,
        touched=touched("x", x, height, width),
    )  # fmt: skip
    return reductions.covariance_of(parts, channels, pixels)
