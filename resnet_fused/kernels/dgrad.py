"""Gradient of a convolution's input, gathered: every input pixel sums over the outputs that have seen it.

``dy`` is made on the way from memory to the tensor cores. In the epilogue either the gradient that comes by the
shortcut is added, or the sums are taken that the batch norm below needs of da behind its ReLU.

With a stride, an input pixel is seen by those taps only that fit its place modulo the stride: such pixels form a class,
and a program works on pixels of one class. The others' taps cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    every_sizes,
    gradient_fields,
    input_sizes,
    is_pointwise,
    mask_words,
    new_activation,
    precision,
    row_matrix,
    window_sizes,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.launch import Config, cdiv, launch
from resnet_fused.kernels.tiles import (
    gradient_terms,
    gradient_tile,
    masked_tile,
    next_step,
    pixel_of,
    store_tile_sums,
    taps_inside,
    tile_of,
    unknown_zero,
)
from resnet_fused.types import Activation, ConvGeometry, Gradient, Pair


@triton.jit
def dgrad_kernel(
    g,
    mask,
    y,
    mean,
    bn_coeffs,
    dy_coeffs,
    conv,
    da,
    below,
    below_mean,
    below_terms,
    sums,
    residual,
    residual_bits,
    HEIGHT,
    WIDTH,
    CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    OUTPUTS,
    IMAGES,
    STRIDE_H,
    STRIDE_W,
    PAD_H,
    PAD_W,
    DILATION_H,
    DILATION_W,
    EVERY_H,
    EVERY_W,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(CHANNELS, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    class_h, class_w = tl.program_id(1) // STRIDE_W, tl.program_id(1) % STRIDE_W
    class_height, class_width = tl.cdiv(HEIGHT, STRIDE_H), tl.cdiv(WIDTH, STRIDE_W)
    places = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image, h, w = pixel_of(places, class_height, class_width)
    h, w = h * STRIDE_H + class_h, w * STRIDE_W + class_w
    row_inside = (image < IMAGES) & (h < HEIGHT) & (w < WIDTH)
    rows = (image * HEIGHT + h) * WIDTH + w
    # Taps of this class. With a stride above 1 the dilation is 1.
    tap_h, tap_w = (class_h + PAD_H) % STRIDE_H, (class_w + PAD_W) % STRIDE_W
    taps_h, taps_w = tl.cdiv(KERNEL_H - tap_h, STRIDE_H), tl.cdiv(KERNEL_W - tap_w, STRIDE_W)
    if POINTWISE:
        source, inside = rows, row_inside
    else:
        # Dividends are multiples of the stride, and none is negative.
        out_h, out_w = (h + PAD_H - tap_h) // STRIDE_H, (w + PAD_W - tap_w) // STRIDE_W
        corner = (image * OUT_HEIGHT + out_h) * OUT_WIDTH + out_w
        seen_h = tl.where(row_inside, taps_inside(out_h, -DILATION_H, OUT_HEIGHT, KERNEL_H), 0)
        seen_w = taps_inside(out_w, -DILATION_W, OUT_WIDTH, KERNEL_W)
    column_inside = channels < CHANNELS
    whole = row_inside[:, None] & column_inside[None, :]
    # What the epilogue needs is loaded before the loop, which hides how long that takes.
    if residual is not None:
        kept = row_inside & (h % EVERY_H == 0) & (w % EVERY_W == 0)
        across, down = (WIDTH + EVERY_W - 1) // EVERY_W, (HEIGHT + EVERY_H - 1) // EVERY_H
        added_rows = (image * down + h // EVERY_H) * across + w // EVERY_W
        added = masked_tile(residual, residual_bits, added_rows, kept, tile_n * BLOCK_N, CHANNELS, BLOCK_N)
    if sums is not None:
        below_value = tile_of(below, rows, row_inside, channels, column_inside, CHANNELS)
    zero = unknown_zero(IMAGES)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    i, j, first = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(OUTPUTS, BLOCK_K)):
        outputs = first + tl.arange(0, BLOCK_K)
        r, s = tap_h + i * STRIDE_H, tap_w + j * STRIDE_W
        if not POINTWISE:
            source = corner - (i * DILATION_H * OUT_WIDTH + j * DILATION_W)
            inside = ((seen_h >> i) & (seen_w >> j) & 1) != 0
        centre, scale, offset, level, slope = gradient_terms(
            mean, bn_coeffs, dy_coeffs, outputs, outputs < OUTPUTS, OUTPUTS, g.dtype.element_ty
        )
        a = gradient_tile(
            g, mask, y, bn_coeffs, dy_coeffs, centre, scale, offset, level, slope, zero, source, inside, first, OUTPUTS,
            BLOCK_K, not POINTWISE,
        )  # fmt: skip
        b = tl.load(
            conv
            + (outputs[:, None] * (KERNEL_H * KERNEL_W) + r * KERNEL_W + s) * CHANNELS
            + channels[None, :],
            (outputs < OUTPUTS)[:, None] & (channels < CHANNELS)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
        if KERNEL_H * KERNEL_W > 1:
            i, j, first = next_step(i, j, first, OUTPUTS, taps_w, BLOCK_K)
        else:
            first += BLOCK_K
    acc = tl.trans(acc)
    if residual is not None:
        acc += added
    out = acc.to(da.dtype.element_ty)
    tl.store(da + rows[:, None] * CHANNELS + channels[None, :], out, whole)
    if sums is not None:
        tile = tl.program_id(1) * (tl.num_programs(0) // tiles_n) + tile_m
        store_tile_sums(
            out.to(tl.float32), below_value, below_mean, below_terms, sums, tile,
            tl.num_programs(0) // tiles_n * tl.num_programs(1), whole, channels, CHANNELS,
        )  # fmt: skip


def _pixels_of_a_class(x: Tensor, window: ConvGeometry) -> int:
    return x.shape[0] * cdiv(x.shape[2], window.stride[0]) * cdiv(x.shape[3], window.stride[1])


def configs(
    gradient: Gradient, conv: Tensor, window: ConvGeometry, below: Activation, *_: object
) -> list[Config]:
    outputs, channels, *kernel = conv.shape
    taps = cdiv(kernel[0] * kernel[1], window.stride[0] * window.stride[1])
    pixels, loaded = _pixels_of_a_class(below.x, window), 1 if gradient.y is None else 2
    return gemm_configs(below.x, pixels, channels, outputs, taps=taps, loaded=loaded, epilogue=2)


def dgrad(
    gradient: Gradient,
    conv: Tensor,
    window: ConvGeometry,
    below: Activation,
    residual: Tensor | None,
    residual_bits: Tensor | None,
    input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """da (+ residual), like below.x, and with statistics of ``below`` sum_dz, sum_dz_xhat and slopes, float32.

    Args:
        gradient: (N, outputs, OH, OW), channels_last.
        conv: (outputs, C, kh, kw).
        below: the convolution's input, (N, C, H, W), channels_last.
        residual: (N, C, ceil(H / every), ceil(W / every)), added at every so-manyth pixel; its bits in its own layout.
    """
    gradient, below, x = reductions.with_dy_coeffs(gradient), reductions.with_bn_coeffs(below), below.x
    da = new_activation(x, x.shape[1], x.shape[2], x.shape[3])
    classes = window.stride[0] * window.stride[1]
    tiles = cdiv(_pixels_of_a_class(x, window), config.block_m)
    sums = None if below.mean is None else reductions.tile_sums(x, classes * tiles, x.shape[1])
    summed = Activation(None) if sums is None else below  # type: ignore[arg-type]
    outputs, _, *kernel = conv.shape
    launch(
        dgrad_kernel,
        (tiles * cdiv(x.shape[1], config.block_n), classes),
        {
            **gradient_fields(gradient, config.block_k),
            "conv": row_matrix(conv, x.dtype), "da": da,
            "below": summed.x, "below_mean": summed.mean, "below_terms": summed.bn_coeffs, "sums": sums,
            "residual": residual, "residual_bits": mask_words(residual_bits, x.shape[1], config.block_n),
            **input_sizes(x), "OUT_HEIGHT": gradient.g.shape[2], "OUT_WIDTH": gradient.g.shape[3], "OUTPUTS": outputs,
            "IMAGES": x.shape[0], **window_sizes(window), **every_sizes(input_stride),
        },
        {
            "KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "POINTWISE": is_pointwise(conv, window),
            "PRECISION": precision(x.dtype), **config.blocks(),
        },
        config,
        flops=2 * (gradient.g.numel() // outputs) * conv.numel(),
    )  # fmt: skip
    return da, *((None, None, None) if sums is None else reductions.sum_tiles(sums, below))
