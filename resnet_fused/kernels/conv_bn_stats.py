"""Forward convolution as an implicit GEMM, with relu(bn(x)) in its prologue and batch norm statistics in its epilogue.

A program computes BLOCK_M pixels x BLOCK_N channels of y; its loop goes over kernel positions (taps) and the input's
channels. While the tile of y is in registers, the program computes its mean and its sums of deviations and of squared
deviations per channel; reductions.norm_statistics merges those of all tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_arguments,
    conv_size_arguments,
    geometry_arguments,
    is_pointwise,
    new_sums,
    precision,
    subsampled_bytes,
    weight_matrix,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.kernels.tiles import (
    advance_tap,
    load_activation_tile,
    load_tile,
    store_tile,
    unravel_pixels,
    valid_taps,
)
from resnet_fused.layout import new_activation
from resnet_fused.types import Activation, ConvGeometry


@triton.jit
def conv_bn_stats_kernel(
    x,  # (N, height, width, channels)
    x_mean,  # (channels,) or None
    x_bn_coeffs,  # (3, channels) or None
    x_shift,  # (channels,) or None
    weight,  # (outputs, KERNEL_H, KERNEL_W, channels)
    y,  # (N, out_height, out_width, outputs)
    tile_stats,  # (3, outputs, tiles of pixels) float32: mean, sum of deviations and that of their squares; or None
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    pixels,  # N * out_height * out_width
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    POINTWISE: tl.constexpr,  # 1x1, stride 1, no padding
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # outputs
    BLOCK_K: tl.constexpr,  # channels
):
    # Tiles of the same pixels are neighbors, since they read the same part of x.
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    pixel_offs = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output_offs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel_valid = pixel_offs < pixels
    if POINTWISE:
        x_offs, x_valid = pixel_offs, pixel_valid
    else:
        image, out_h, out_w = unravel_pixels(pixel_offs, out_height, out_width)
        top, left = out_h * stride_h - pad_h, out_w * stride_w - pad_w
        corner = (image * height + top) * width + left
        valid_h = valid_taps(top, dilation_h, height, KERNEL_H)
        valid_w = valid_taps(left, dilation_w, width, KERNEL_W)
        valid_h = tl.where(pixel_valid, valid_h, 0)
    a = (x, x_mean, x_bn_coeffs, x_shift)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    r, s, first_channel = 0, 0, 0
    for _ in range(KERNEL_H * KERNEL_W * tl.cdiv(channels, BLOCK_K)):
        channel_offs = first_channel + tl.arange(0, BLOCK_K)
        if not POINTWISE:
            x_offs = corner + (r * dilation_h * width + s * dilation_w)
            x_valid = ((valid_h >> r) & (valid_w >> s) & 1) != 0
        value = load_activation_tile(a, x_offs, x_valid, channel_offs, channels, not POINTWISE)
        weight_offs = output_offs * (KERNEL_H * KERNEL_W) + r * KERNEL_W + s
        b = load_tile(weight, weight_offs, output_offs < outputs, channel_offs, channels)
        acc = tl.dot(b, tl.trans(value), acc, input_precision=PRECISION)
        if KERNEL_H * KERNEL_W > 1:
            r, s, first_channel = advance_tap(r, s, first_channel, channels, KERNEL_W, BLOCK_K)
        else:
            first_channel += BLOCK_K
    out = tl.trans(acc).to(y.dtype.element_ty)
    store_tile(y, out, pixel_offs, pixel_valid, output_offs, outputs)
    if tile_stats is not None:
        output_valid = output_offs < outputs
        valid = pixel_valid[:, None] & output_valid[None, :]
        # Of the values as they are stored, centered: no precision is lost where |mean| >> std.
        value = tl.where(valid, out.to(tl.float32), 0.0)
        count = tl.minimum(BLOCK_M, pixels - tile_m * BLOCK_M)
        tile_mean = tl.sum(value, 0) / count
        deviation = tl.where(valid, value - tile_mean[None, :], 0.0)
        tiles_m = tl.cdiv(pixels, BLOCK_M)
        pointers = tile_stats + output_offs * tiles_m + tile_m
        tl.store(pointers, tile_mean, output_valid)
        # Not zero: the mean is rounded, by much of a deviation where |mean| >> std.
        tl.store(pointers + outputs * tiles_m, tl.sum(deviation, 0), output_valid)
        tl.store(pointers + 2 * outputs * tiles_m, tl.sum(deviation * deviation, 0), output_valid)


def configs(a: Activation, weight: Tensor, geometry: ConvGeometry, *_: object) -> list[Config]:
    height, width = geometry.out_size(a.x, weight)
    pixels = a.x.shape[0] * height * width
    return gemm_configs(a.x, pixels, *weight.shape[:2], taps=weight.shape[2] * weight.shape[3])


def conv_bn_stats(
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    eps: float,
    training: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = conv(a) and, in training, the statistics of its channels; see reference.conv_bn.conv_bn_stats.

    Args:
        a: (N, C, H, W), channels_last.
        weight: (outputs, C, kh, kw).
        gamma, beta: (outputs,) float32, weight and bias of y's batch norm.

    Returns:
        y: (N, outputs, H', W'), channels_last.
        mean, biased var, invstd: (outputs,) and bn_coeffs: (3, outputs), float32; empty unless ``training``.
    """
    height, width = geometry.out_size(a.x, weight)
    y = new_activation(a.x, weight.shape[0], height, width)
    pixels, outputs = y.shape[0] * height * width, weight.shape[0]
    tiles = cdiv(pixels, config.block_m)
    tile_stats = new_sums(y, 3, outputs, tiles) if training else None
    Launch(
        conv_bn_stats_kernel,
        (tiles * cdiv(outputs, config.block_n),),
        {
            **activation_arguments(a), "weight": weight_matrix(weight, y.dtype), "y": y, "tile_stats": tile_stats,
            **conv_size_arguments(a.x, y), "pixels": pixels, **geometry_arguments(geometry),
        },
        {
            "KERNEL_H": weight.shape[2], "KERNEL_W": weight.shape[3], "POINTWISE": is_pointwise(weight, geometry),
            "PRECISION": precision(y.dtype), **config.blocks(),
        },
        config,
        flops=2 * pixels * weight.numel(),
        partial_bytes=subsampled_bytes(height, width, x=a.x) if weight.shape[2:] == (1, 1) else None,
    ).start()  # fmt: skip
    if tile_stats is None:
        mean, var, invstd, bn_coeffs = (new_sums(y, 0) for _ in range(4))
        return y, mean, var, invstd, bn_coeffs
    return y, *reductions.norm_statistics(tile_stats, config.block_m, pixels, eps, gamma, beta)
