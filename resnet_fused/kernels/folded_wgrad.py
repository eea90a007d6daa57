"""Q = dz^T c of one or both folded convolutions of a block, with the sums of dz: dz is read once for both.

dz is the gradient behind the block's ReLU, from the gradient of the output and the mask bits. A program makes
BLOCK_N outputs x BLOCK_K channels of one of the two, of one split of the pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_fields,
    every_sizes,
    mask_words,
    new_float,
    precision,
    skip_fields,
    touched_of_both,
)
from resnet_fused.kernels.autotune.heuristics import sum_configs
from resnet_fused.kernels.launch import Config, cdiv, launch
from resnet_fused.kernels.tiles import (
    activated,
    activation_terms,
    masked_tile,
    pixel_of,
    pixels_later,
    tile_of,
)
from resnet_fused.types import Activation, Pair


@triton.jit
def _products(
    g,
    mask,
    x,
    mean,
    bn_coeffs,
    shift,
    part,
    sums,
    HEIGHT,
    WIDTH,
    CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    OUTPUTS,
    PIXELS,
    EVERY_H,
    EVERY_W,
    tile,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of dz^T c goes to ``part``; with the first of its row the sums of dz to ``sums``, where that is given."""
    first = tl.program_id(1) * BLOCK_N
    outputs = first + tl.arange(0, BLOCK_N)
    channels = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    per_split = tl.cdiv(tl.cdiv(PIXELS, BLOCK_M), tl.num_programs(2))
    start = tl.program_id(2) * per_split * BLOCK_M
    LOADED: tl.constexpr = bn_coeffs is None and shift is None  # the first operand, as in wgrad
    acc = tl.zeros((BLOCK_K, BLOCK_N) if LOADED else (BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    channel_inside = channels < CHANNELS
    centre, scale, offset, level = activation_terms(
        mean, bn_coeffs, shift, channels, channel_inside, CHANNELS, x.dtype.element_ty
    )
    if not POINTWISE:
        image, h, w = pixel_of(start + tl.arange(0, BLOCK_M), OUT_HEIGHT, OUT_WIDTH)
        more_images, more_h, more_w = pixel_of(BLOCK_M, OUT_HEIGHT, OUT_WIDTH)
    for step in range(per_split):
        rows = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < PIXELS
        dz = masked_tile(g, mask, rows, inside, first, OUTPUTS, BLOCK_N)
        source = rows
        if not POINTWISE:
            source = (image * HEIGHT + h * EVERY_H) * WIDTH + w * EVERY_W
        value = tile_of(x, source, inside, channels, channel_inside, CHANNELS)
        # dz is 0 in rows outside.
        c = activated(value, bn_coeffs, shift, centre, scale, offset, level, inside, False)
        if sums is not None:
            total += tl.sum(dz.to(tl.float32), 0)
        if LOADED:
            acc = tl.dot(tl.trans(c), dz, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(dz), c, acc, input_precision=PRECISION)
        if not POINTWISE:
            image, h, w = pixels_later(image, h, w, more_images, more_h, more_w, OUT_HEIGHT, OUT_WIDTH)
    if LOADED:
        acc = tl.trans(acc)
    whole = (outputs < OUTPUTS)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(part + outputs[:, None] * CHANNELS + channels[None, :], acc, whole)
    if sums is not None:
        tl.store(sums + outputs, total, (outputs < OUTPUTS) & (tile == 0))


@triton.jit
def folded_wgrad_kernel(
    g,
    mask,
    x,
    mean,
    bn_coeffs,
    shift,
    skip,
    skip_shift,
    parts,
    HEIGHT,
    WIDTH,
    CHANNELS,
    SKIP_HEIGHT,
    SKIP_WIDTH,
    SKIP_CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    OUTPUTS,
    PIXELS,
    EVERY_H,
    EVERY_W,
    SKIP_EVERY_H,
    SKIP_EVERY_W,
    POINTWISE: tl.constexpr,
    SKIP_POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = parts + tl.program_id(2) * OUTPUTS * (CHANNELS + SKIP_CHANNELS + 1)
    skip_part = part + OUTPUTS * CHANNELS
    sums = skip_part + OUTPUTS * SKIP_CHANNELS
    tile, tiles = tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_K)
    if tile < tiles:
        _products(
            g, mask, x, mean, bn_coeffs, shift, part, sums, HEIGHT, WIDTH, CHANNELS,
            OUT_HEIGHT, OUT_WIDTH, OUTPUTS, PIXELS, EVERY_H, EVERY_W, tile,
            POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif skip is not None:
        _products(
            g, mask, skip, None, None, skip_shift, skip_part, None, SKIP_HEIGHT, SKIP_WIDTH, SKIP_CHANNELS,
            OUT_HEIGHT, OUT_WIDTH, OUTPUTS, PIXELS, SKIP_EVERY_H, SKIP_EVERY_W, tile - tiles,
            SKIP_POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def configs(
    grad: Tensor, mask: Tensor, source: Activation, input_stride: Pair, skip: Activation | None, *_: object
) -> list[Config]:
    outputs, channels = grad.shape[1], source.x.shape[1] + (0 if skip is None else skip.x.shape[1])
    # Masks take registers too: with larger tiles some would be spilled.
    return sum_configs(grad, grad.numel() // outputs, outputs, channels, largest=128 * 128)


def folded_wgrad(
    grad: Tensor,
    mask: Tensor,
    source: Activation,
    input_stride: Pair,
    skip: Activation | None,
    skip_input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Q (outputs, C) of ``source``, that of ``skip``, and the sums of dz (outputs,), float32.

    Args:
        grad: (N, outputs, H, W), channels_last; bits: the mask of what it is the gradient of.
        source, skip: inputs of folded convolutions, channels_last; of their pixels one in so many counts, down and
            across. ``skip`` has no statistics.
    """
    source = reductions.with_bn_coeffs(source)
    images, outputs, height, width = grad.shape
    channels, others = source.x.shape[1], 0 if skip is None else skip.x.shape[1]
    pixels = images * height * width
    parts = new_float(grad, config.splits, outputs * (channels + others + 1))
    launch(
        folded_wgrad_kernel,
        (
            cdiv(channels, config.block_k) + cdiv(others, config.block_k),
            cdiv(outputs, config.block_n),
            config.splits,
        ),
        {
            "g": grad, "mask": mask_words(mask, outputs, config.block_n),
            **activation_fields(source), **skip_fields(skip), "parts": parts,
            "HEIGHT": source.x.shape[2], "WIDTH": source.x.shape[3], "CHANNELS": channels,
            "SKIP_HEIGHT": 0 if skip is None else skip.x.shape[2], "SKIP_WIDTH": 0 if skip is None else skip.x.shape[3],
            "SKIP_CHANNELS": others, "OUT_HEIGHT": height, "OUT_WIDTH": width, "OUTPUTS": outputs, "PIXELS": pixels,
            **every_sizes(input_stride), **every_sizes(skip_input_stride, "SKIP_"),
        },
        {
            "POINTWISE": input_stride == (1, 1), "SKIP_POINTWISE": skip_input_stride == (1, 1),
            "PRECISION": precision(grad.dtype), **config.blocks(),
        },
        config,
        flops=2 * pixels * outputs * (channels + others),
        touched=touched_of_both(source, skip, height, width),
    )  # fmt: skip
    product, total = new_float(grad, outputs, channels), new_float(grad, outputs)
    skip_product = None if skip is None else new_float(grad, outputs, others)
    reductions.sum_splits(parts, product, skip_product, total)
    return product, skip_product, total
