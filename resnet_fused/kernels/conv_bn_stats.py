"""Forward convolution of an activation, as an implicit GEMM, with batch norm statistics of what it writes.

A program makes BLOCK_M pixels x BLOCK_N channels of y. It goes through the taps of the kernel and the input's channels;
relu(bn(x)) is made on the way from memory to the tensor cores. While the tile is still in registers its mean and its
sum of squared deviations are taken; ``norm_statistics`` merges those of all tiles by Chan's formula.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_fields,
    input_sizes,
    is_pointwise,
    new_activation,
    precision,
    row_matrix,
    touched,
    window_sizes,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.launch import Config, cdiv, launch
from resnet_fused.kernels.tiles import activation_tile, next_step, pixel_of, taps_inside
from resnet_fused.types import Activation, ConvGeometry


@triton.jit
def conv_bn_stats_kernel(
    x,
    mean,
    bn_coeffs,
    shift,
    conv,
    y,
    statistics,
    HEIGHT,
    WIDTH,
    CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    OUTPUTS,
    PIXELS,
    STRIDE_H,
    STRIDE_W,
    PAD_H,
    PAD_W,
    DILATION_H,
    DILATION_W,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles of one row of tiles follow each other: they read the same pixels.
    tiles_n = tl.cdiv(OUTPUTS, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < PIXELS
    if POINTWISE:
        source, inside = rows, row_inside
    else:
        image, out_h, out_w = pixel_of(rows, OUT_HEIGHT, OUT_WIDTH)
        top, left = out_h * STRIDE_H - PAD_H, out_w * STRIDE_W - PAD_W
        corner = (image * HEIGHT + top) * WIDTH + left
        seen_h = taps_inside(top, DILATION_H, HEIGHT, KERNEL_H)
        seen_w = taps_inside(left, DILATION_W, WIDTH, KERNEL_W)
        seen_h = tl.where(row_inside, seen_h, 0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    r, s, first = 0, 0, 0
    for _ in range(KERNEL_H * KERNEL_W * tl.cdiv(CHANNELS, BLOCK_K)):
        channels = first + tl.arange(0, BLOCK_K)
        if not POINTWISE:
            source = corner + (r * DILATION_H * WIDTH + s * DILATION_W)
            inside = ((seen_h >> r) & (seen_w >> s) & 1) != 0
        a = activation_tile(x, mean, bn_coeffs, shift, source, inside, channels, CHANNELS, not POINTWISE)
        b = tl.load(
            conv
            + (outputs[:, None] * (KERNEL_H * KERNEL_W) + r * KERNEL_W + s) * CHANNELS
            + channels[None, :],
            (channels < CHANNELS)[None, :] & (outputs < OUTPUTS)[:, None],
            other=0.0,
        )
        acc = tl.dot(b, tl.trans(a), acc, input_precision=PRECISION)
        if KERNEL_H * KERNEL_W > 1:
            r, s, first = next_step(r, s, first, CHANNELS, KERNEL_W, BLOCK_K)
        else:
            first += BLOCK_K
    out = tl.trans(acc).to(y.dtype.element_ty)
    column_inside = outputs < OUTPUTS
    whole = row_inside[:, None] & column_inside[None, :]
    tl.store(y + rows[:, None] * OUTPUTS + outputs[None, :], out, whole)
    if statistics is not None:
        # Of the values as they are stored. Two passes over registers: nothing cancels.
        value = tl.where(whole, out.to(tl.float32), 0.0)
        count = tl.minimum(BLOCK_M, PIXELS - tile_m * BLOCK_M)
        tile_mean = tl.sum(value, 0) / count
        deviation = tl.where(whole, value - tile_mean[None, :], 0.0)
        tiles_m = tl.cdiv(PIXELS, BLOCK_M)
        place = statistics + outputs * tiles_m + tile_m
        tl.store(place, tile_mean, column_inside)
        tl.store(place + OUTPUTS * tiles_m, tl.sum(deviation * deviation, 0), column_inside)


def configs(source: Activation, conv: Tensor, window: ConvGeometry, *_: object) -> list[Config]:
    height, width = window.out_size(source.x, conv)
    pixels = source.x.shape[0] * height * width
    return gemm_configs(source.x, pixels, *conv.shape[:2], taps=conv.shape[2] * conv.shape[3])


def conv_bn_stats(
    source: Activation,
    conv: Tensor,
    window: ConvGeometry,
    eps: float,
    measure: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and mean, biased variance, invstd and terms of its channels; these are empty unless ``measure``.

    Args:
        source: (N, C, H, W), channels_last.
        conv: (outputs, C, kh, kw).
        gamma, beta: weight and bias of the batch norm of y, for its terms.
    """
    source = reductions.with_bn_coeffs(source)
    height, width = window.out_size(source.x, conv)
    y = new_activation(source.x, conv.shape[0], height, width)
    pixels, outputs = y.shape[0] * height * width, conv.shape[0]
    tiles = cdiv(pixels, config.block_m)
    statistics = reductions.tile_sums(y, tiles, outputs) if measure else None
    launch(
        conv_bn_stats_kernel,
        (tiles * cdiv(outputs, config.block_n),),
        {
            **activation_fields(source), "conv": row_matrix(conv, y.dtype), "y": y, "statistics": statistics,
            **input_sizes(source.x), "OUT_HEIGHT": height, "OUT_WIDTH": width, "OUTPUTS": outputs, "PIXELS": pixels,
            **window_sizes(window),
        },
        {
            "KERNEL_H": conv.shape[2], "KERNEL_W": conv.shape[3], "POINTWISE": is_pointwise(conv, window),
            "PRECISION": precision(y.dtype), **config.blocks(),
        },
        config,
        flops=2 * pixels * conv.numel(),
        touched=touched("x", source.x, height, width) if conv.shape[2:] == (1, 1) else None,
    )  # fmt: skip
    if statistics is None:
        mean, var, invstd, bn_coeffs = (
            torch.empty(0, dtype=torch.float32, device=y.device) for _ in range(4)
        )
    else:
        mean, var, invstd, bn_coeffs = reductions.norm_statistics(
            statistics, config.block_m, pixels, eps, gamma, beta
        )
    return y, mean, var, invstd, bn_coeffs
