"""Q = dz^T a of one or both folded convolutions of a block, and dz summed over the pixels; dz is read once for both.

dz is the gradient before the block's last ReLU: the gradient w.r.t. the block's output times the mask. A program
computes BLOCK_N outputs x BLOCK_K channels of one of the two from one split of the pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_arguments,
    folded_size_arguments,
    mask_words,
    new_sums,
    precision,
    skip_arguments,
    subsampled_bytes,
)
from resnet_fused.kernels.autotune.heuristics import sum_configs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.kernels.tiles import (
    advance_pixels,
    apply_activation,
    load_activation_coeffs,
    load_masked_tile,
    load_tile,
    store_tile,
    unravel_pixels,
)
from resnet_fused.types import Activation, Pair


@triton.jit
def _q_tile(
    g,  # (pixels, outputs)
    mask,  # (pixels, bytes or words)
    a,  # Activation (tiles), x: (N, height, width, channels)
    q,  # (outputs, channels)
    sum_dz,  # (outputs,) or None
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    pixels,
    input_stride_h,
    input_stride_w,
    tile_k,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes and stores a tile of q and, with the first tile of its row, sum_dz; see folded_wgrad_kernel."""
    first_output = tl.program_id(1) * BLOCK_N
    output_offs = first_output + tl.arange(0, BLOCK_N)
    channel_offs = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(pixels, BLOCK_M), tl.num_programs(2))
    start = tl.program_id(2) * steps * BLOCK_M
    x, _, bn_coeffs, shift = a
    LOADED: tl.constexpr = bn_coeffs is None and shift is None  # the order of operands, see wgrad_kernel
    acc = tl.zeros((BLOCK_K, BLOCK_N) if LOADED else (BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    coeffs = load_activation_coeffs(a, channel_offs, channels)
    if not POINTWISE:
        image, h, w = unravel_pixels(start + tl.arange(0, BLOCK_M), out_height, out_width)
        step_images, step_h, step_w = unravel_pixels(BLOCK_M, out_height, out_width)
    for step in range(steps):
        pixel_offs = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel_valid = pixel_offs < pixels
        dz = load_masked_tile(g, mask, pixel_offs, pixel_valid, first_output, outputs, BLOCK_N)
        x_offs = pixel_offs
        if not POINTWISE:
            x_offs = (image * height + h * input_stride_h) * width + w * input_stride_w
        x_tile = load_tile(x, x_offs, pixel_valid, channel_offs, channels)
        # Not padded: dz is 0 at pixels outside.
        a_tile = apply_activation(x_tile, a, coeffs, pixel_valid, False)
        if sum_dz is not None:
            total += tl.sum(dz.to(tl.float32), 0)
        if LOADED:
            acc = tl.dot(tl.trans(a_tile), dz, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(dz), a_tile, acc, input_precision=PRECISION)
        if not POINTWISE:
            image, h, w = advance_pixels(image, h, w, step_images, step_h, step_w, out_height, out_width)
    if LOADED:
        acc = tl.trans(acc)
    store_tile(q, acc, output_offs, output_offs < outputs, channel_offs, channels)
    if sum_dz is not None:
        tl.store(sum_dz + output_offs, total, (output_offs < outputs) & (tile_k == 0))


@triton.jit
def folded_wgrad_kernel(
    g,  # (N, out_height, out_width, outputs)
    mask,  # (pixels, bytes or words)
    x,  # (N, height, width, channels)
    x_mean,  # (channels,) or None
    x_bn_coeffs,  # (3, channels) or None
    x_shift,  # (channels,) or None
    skip,  # (N, skip_height, skip_width, skip_channels) or None
    skip_shift,  # (skip_channels,) or None
    partial_sums,  # (splits, outputs * (channels + skip_channels + 1)) float32: q, skip_q and sum_dz
    height,
    width,
    channels,
    skip_height,
    skip_width,
    skip_channels,
    out_height,
    out_width,
    outputs,
    pixels,  # N * out_height * out_width
    input_stride_h,
    input_stride_w,
    skip_input_stride_h,
    skip_input_stride_w,
    POINTWISE: tl.constexpr,  # input strides of 1
    SKIP_POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # outputs
    BLOCK_K: tl.constexpr,  # channels
):
    q = partial_sums + tl.program_id(2) * outputs * (channels + skip_channels + 1)
    skip_q = q + outputs * channels
    sum_dz = skip_q + outputs * skip_channels
    tile_k, tiles_k = tl.program_id(0), tl.cdiv(channels, BLOCK_K)
    if tile_k < tiles_k:
        _q_tile(
            g, mask, (x, x_mean, x_bn_coeffs, x_shift), q, sum_dz, height, width, channels,
            out_height, out_width, outputs, pixels, input_stride_h, input_stride_w, tile_k,
            POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif skip is not None:
        _q_tile(
            g, mask, (skip, None, None, skip_shift), skip_q, None, skip_height, skip_width, skip_channels,
            out_height, out_width, outputs, pixels, skip_input_stride_h, skip_input_stride_w, tile_k - tiles_k,
            SKIP_POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def configs(
    grad: Tensor, mask: Tensor, a: Activation, input_stride: Pair, skip: Activation | None, *_: object
) -> list[Config]:
    outputs, channels = grad.shape[1], a.x.shape[1] + (0 if skip is None else skip.x.shape[1])
    # Masks take registers too: larger tiles would spill.
    return sum_configs(grad, grad.numel() // outputs, outputs, channels, largest=128 * 128)


def folded_wgrad(
    grad: Tensor,
    mask: Tensor,
    a: Activation,
    input_stride: Pair,
    skip: Activation | None,
    skip_input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Q of ``a``, that of ``skip``, and dz summed over the pixels; see reference.folded_conv_bn.folded_wgrad.

    Args:
        grad: (N, outputs, H, W), channels_last; mask: uint8 (N*H*W, ceil(outputs / 8)).
        a, skip: inputs of folded convolutions with H x W pixels after subsampling, channels_last. ``skip`` has no
            statistics.

    Returns:
        q: (outputs, C); skip_q: (outputs, skip's channels) or None; sum_dz: (outputs,), float32.
    """
    images, outputs, height, width = grad.shape
    channels, skip_channels = a.x.shape[1], 0 if skip is None else skip.x.shape[1]
    partial_sums = new_sums(grad, config.splits, outputs * (channels + skip_channels + 1))
    Launch(
        folded_wgrad_kernel,
        (
            cdiv(channels, config.block_k) + cdiv(skip_channels, config.block_k),
            cdiv(outputs, config.block_n),
            config.splits,
        ),
        {
            "g": grad, "mask": mask_words(mask, outputs, config.block_n),
            **activation_arguments(a), **skip_arguments(skip), "partial_sums": partial_sums,
            **folded_size_arguments(a, input_stride, skip, skip_input_stride, grad),
        },
        {
            "POINTWISE": input_stride == (1, 1), "SKIP_POINTWISE": skip_input_stride == (1, 1),
            "PRECISION": precision(grad.dtype), **config.blocks(),
        },
        config,
        flops=2 * images * height * width * outputs * (channels + skip_channels),
        partial_bytes=subsampled_bytes(height, width, x=a.x, skip=None if skip is None else skip.x),
    ).start()  # fmt: skip
    q, sum_dz = new_sums(grad, outputs, channels), new_sums(grad, outputs)
    skip_q = None if skip is None else new_sums(grad, outputs, skip_channels)
    reductions.sum_splits(partial_sums, q, skip_q, sum_dz)
    return q, skip_q, sum_dz
