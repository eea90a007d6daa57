"""Sums over the pixels of products of channels: the gradient of a convolution's weight, dy^T a.

A program makes BLOCK_N outputs x BLOCK_K input channels at one tap of the kernel, of one split of the pixels. What the
splits have found goes to memory and is summed in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_fields,
    gradient_fields,
    input_sizes,
    is_pointwise,
    new_float,
    precision,
    touched,
    window_sizes,
)
from resnet_fused.kernels.autotune.heuristics import sum_configs
from resnet_fused.kernels.launch import Config, cdiv, launch
from resnet_fused.kernels.tiles import (
    activated,
    activation_terms,
    gradient_terms,
    gradient_tile,
    pixel_of,
    pixels_later,
    tile_of,
    unknown_zero,
)
from resnet_fused.types import Activation, ConvGeometry, Gradient


@triton.jit
def wgrad_kernel(
    g,
    mask,
    y,
    mean,
    bn_coeffs,
    dy_coeffs,
    x,
    x_mean,
    x_terms,
    x_shift,
    parts,
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
    KERNEL_W,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pixels at a time."""
    tiles_k = tl.cdiv(CHANNELS, BLOCK_K)
    tap, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    first = tl.program_id(1) * BLOCK_N
    outputs = first + tl.arange(0, BLOCK_N)
    channels = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    per_split = tl.cdiv(tl.cdiv(PIXELS, BLOCK_M), tl.num_programs(2))
    start = tl.program_id(2) * per_split * BLOCK_M
    down, right = tap // KERNEL_W * DILATION_H - PAD_H, tap % KERNEL_W * DILATION_W - PAD_W
    output_inside, channel_inside = outputs < OUTPUTS, channels < CHANNELS
    centre, scale, offset, level, slope = gradient_terms(
        mean, bn_coeffs, dy_coeffs, outputs, output_inside, OUTPUTS, g.dtype.element_ty
    )
    x_centre, x_scale, x_offset, x_level = activation_terms(
        x_mean, x_terms, x_shift, channels, channel_inside, CHANNELS, x.dtype.element_ty
    )
    # On sm_90 the second operand of a product comes from shared memory and the first one does if it is loaded as it
    # is: what is computed is second. A first operand in registers would change while wgmma may still read it.
    LOADED: tl.constexpr = x_terms is None and x_shift is None
    zero = unknown_zero(PIXELS)
    acc = tl.zeros((BLOCK_K, BLOCK_N) if LOADED else (BLOCK_N, BLOCK_K), tl.float32)
    if not POINTWISE:
        image, out_h, out_w = pixel_of(start + tl.arange(0, BLOCK_M), OUT_HEIGHT, OUT_WIDTH)
        more_images, more_h, more_w = pixel_of(BLOCK_M, OUT_HEIGHT, OUT_WIDTH)
    for step in range(per_split):
        rows = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
        row_inside = rows < PIXELS
        # a is 0 in rows outside.
        dy = gradient_tile(
            g, mask, y, bn_coeffs, dy_coeffs, centre, scale, offset, level, slope, zero, rows, row_inside, first,
            OUTPUTS, BLOCK_N, False,
        )  # fmt: skip
        if POINTWISE:
            source, inside = rows, row_inside
        else:
            h, w = out_h * STRIDE_H + down, out_w * STRIDE_W + right
            inside = row_inside & (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
            source = (image * HEIGHT + h) * WIDTH + w
        value = tile_of(x, source, inside, channels, channel_inside, CHANNELS)
        a = activated(value, x_terms, x_shift, x_centre, x_scale, x_offset, x_level, inside, True)
        if LOADED:
            acc = tl.dot(tl.trans(a), dy, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(dy), a, acc, input_precision=PRECISION)
        if not POINTWISE:
            image, out_h, out_w = pixels_later(
                image, out_h, out_w, more_images, more_h, more_w, OUT_HEIGHT, OUT_WIDTH
            )
    if LOADED:
        acc = tl.trans(acc)
    columns = tl.num_programs(0) // tiles_k * CHANNELS
    part = parts + tl.program_id(2) * OUTPUTS * columns
    inside = output_inside[:, None] & channel_inside[None, :]
    tl.store(part + outputs[:, None] * columns + tap * CHANNELS + channels[None, :], acc, inside)


def configs(
    gradient: Gradient, source: Activation, conv: Tensor, window: ConvGeometry, *_: object
) -> list[Config]:
    outputs, channels, *kernel = conv.shape
    pixels, loaded = gradient.g.numel() // outputs, 2 if gradient.y is None else 3
    return sum_configs(source.x, pixels, outputs, channels, taps=kernel[0] * kernel[1], loaded=loaded)


def wgrad(
    gradient: Gradient, source: Activation, conv: Tensor, window: ConvGeometry, config: Config
) -> Tensor:
    """dconv (outputs, C, kh, kw), float32, channels_last.

    Args:
        gradient: (N, outputs, OH, OW), channels_last.
        source: the convolution's input, (N, C, H, W), channels_last.
        conv: for its shape.
    """
    gradient, source = reductions.with_dy_coeffs(gradient), reductions.with_bn_coeffs(source)
    x, g = source.x, gradient.g
    outputs, channels, kernel_h, kernel_w = conv.shape
    pixels = g.numel() // outputs
    parts = new_float(x, config.splits, outputs, kernel_h, kernel_w, channels)
    launch(
        wgrad_kernel,
        (
            kernel_h * kernel_w * cdiv(channels, config.block_k),
            cdiv(outputs, config.block_n),
            config.splits,
        ),
        {
            **gradient_fields(gradient, config.block_n), **activation_fields(source, "x_"), "parts": parts,
            **input_sizes(x), "OUT_HEIGHT": g.shape[2], "OUT_WIDTH": g.shape[3], "OUTPUTS": outputs, "PIXELS": pixels,
            **window_sizes(window), "KERNEL_W": kernel_w,
        },
        {"POINTWISE": is_pointwise(conv, window), "PRECISION": precision(x.dtype), **config.blocks()},
        config,
        flops=2 * pixels * conv.numel(),
        touched=touched("x", x, g.shape[2], g.shape[3]) if (kernel_h, kernel_w) == (1, 1) else None,
    )  # fmt: skip
    found = parts[0]
    if config.splits > 1:
        found = new_float(x, *parts.shape[1:])
        reductions.sum_splits(parts, found)
    return found.permute(0, 3, 1, 2)
