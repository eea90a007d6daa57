"""Gradient w.r.t. a convolution's weight: dy^T a, summed over the pixels.

A program computes BLOCK_N outputs x BLOCK_K input channels at one kernel position (tap) from one split of the pixels.
The splits write partial sums, which are added in a fixed order.
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
    gradient_arguments,
    is_pointwise,
    new_sums,
    precision,
    subsampled_bytes,
)
from resnet_fused.kernels.autotune.heuristics import sum_configs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.kernels.tiles import (
    advance_pixels,
    apply_activation,
    load_activation_coeffs,
    load_gradient_coeffs,
    load_gradient_tile,
    load_tile,
    runtime_zero,
    unravel_pixels,
)
from resnet_fused.types import Activation, ConvGeometry, Gradient


@triton.jit
def wgrad_kernel(
    g,  # (N, out_height, out_width, outputs)
    mask,  # (N * out_height * out_width, bytes or words) or None
    y,  # (N, out_height, out_width, outputs) or None
    y_mean,  # (outputs,) or None
    y_bn_coeffs,  # (3, outputs) or None
    dy_coeffs,  # (3, outputs) or None
    x,  # (N, height, width, channels)
    x_mean,  # (channels,) or None
    x_bn_coeffs,  # (3, channels) or None
    x_shift,  # (channels,) or None
    partial_sums,  # (splits, outputs, kernel height, kernel_w, channels) float32
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
    kernel_w,
    POINTWISE: tl.constexpr,  # 1x1, stride 1, no padding
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # outputs
    BLOCK_K: tl.constexpr,  # channels
):
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tap, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    first_output = tl.program_id(1) * BLOCK_N
    output_offs = first_output + tl.arange(0, BLOCK_N)
    channel_offs = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(pixels, BLOCK_M), tl.num_programs(2))
    start = tl.program_id(2) * steps * BLOCK_M
    tap_h, tap_w = tap // kernel_w * dilation_h - pad_h, tap % kernel_w * dilation_w - pad_w
    dy, a = (g, mask, y, y_mean, y_bn_coeffs, dy_coeffs), (x, x_mean, x_bn_coeffs, x_shift)
    y_coeffs = load_gradient_coeffs(dy, output_offs, outputs)
    x_coeffs = load_activation_coeffs(a, channel_offs, channels)
    # On sm_90 the second operand of tl.dot comes from shared memory, and so does the first if it is loaded as it is:
    # a computed operand is second. A first operand in registers would change while wgmma may still read it.
    LOADED: tl.constexpr = x_bn_coeffs is None and x_shift is None
    zero = runtime_zero(pixels)
    acc = tl.zeros((BLOCK_K, BLOCK_N) if LOADED else (BLOCK_N, BLOCK_K), tl.float32)
    if not POINTWISE:
        image, out_h, out_w = unravel_pixels(start + tl.arange(0, BLOCK_M), out_height, out_width)
        step_images, step_h, step_w = unravel_pixels(BLOCK_M, out_height, out_width)
    for step in range(steps):
        pixel_offs = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel_valid = pixel_offs < pixels
        # Not padded: a is 0 at pixels outside.
        dy_tile = load_gradient_tile(
            dy, y_coeffs, zero, pixel_offs, pixel_valid, first_output, outputs, BLOCK_N, False
        )
        if POINTWISE:
            x_offs, x_valid = pixel_offs, pixel_valid
        else:
            h, w = out_h * stride_h + tap_h, out_w * stride_w + tap_w
            x_valid = pixel_valid & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            x_offs = (image * height + h) * width + w
        x_tile = load_tile(x, x_offs, x_valid, channel_offs, channels)
        a_tile = apply_activation(x_tile, a, x_coeffs, x_valid, True)
        if LOADED:
            acc = tl.dot(tl.trans(a_tile), dy_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(dy_tile), a_tile, acc, input_precision=PRECISION)
        if not POINTWISE:
            image, out_h, out_w = advance_pixels(
                image, out_h, out_w, step_images, step_h, step_w, out_height, out_width
            )
    if LOADED:
        acc = tl.trans(acc)
    columns = tl.num_programs(0) // tiles_k * channels
    split_sums = partial_sums + tl.program_id(2) * outputs * columns
    pointers = split_sums + output_offs[:, None] * columns + tap * channels + channel_offs[None, :]
    tl.store(pointers, acc, (output_offs < outputs)[:, None] & (channel_offs < channels)[None, :])


def configs(dy: Gradient, a: Activation, weight: Tensor, geometry: ConvGeometry) -> list[Config]:
    outputs, channels, *kernel = weight.shape
    pixels, loaded = dy.g.numel() // outputs, 2 if dy.y is None else 3
    return sum_configs(a.x, pixels, outputs, channels, taps=kernel[0] * kernel[1], loaded=loaded)


def wgrad(dy: Gradient, a: Activation, weight: Tensor, geometry: ConvGeometry, config: Config) -> Tensor:
    """dweight (outputs, C, kh, kw), float32, channels_last; see reference.conv_bn.wgrad.

    Args:
        dy: (N, outputs, H', W'), channels_last.
        a: the convolution's input, (N, C, H, W), channels_last.
        weight: (outputs, C, kh, kw), given for its shape.
    """
    x, g = a.x, dy.g
    outputs, channels, kernel_h, kernel_w = weight.shape
    pixels = g.numel() // outputs
    partial_sums = new_sums(x, config.splits, outputs, kernel_h, kernel_w, channels)
    Launch(
        wgrad_kernel,
        (
            kernel_h * kernel_w * cdiv(channels, config.block_k),
            cdiv(outputs, config.block_n),
            config.splits,
        ),
        {
            **gradient_arguments(dy, config.block_n), **activation_arguments(a), "partial_sums": partial_sums,
            **conv_size_arguments(x, g), "pixels": pixels, **geometry_arguments(geometry), "kernel_w": kernel_w,
        },
        {"POINTWISE": is_pointwise(weight, geometry), "PRECISION": precision(x.dtype), **config.blocks()},
        config,
        flops=2 * pixels * weight.numel(),
        partial_bytes=subsampled_bytes(*g.shape[2:], x=x) if (kernel_h, kernel_w) == (1, 1) else None,
    ).start()  # fmt: skip
    dweight = partial_sums[0]
    if config.splits > 1:
        dweight = new_sums(x, *partial_sums.shape[1:])
        reductions.sum_splits(partial_sums, dweight)
    return dweight.permute(0, 3, 1, 2)
