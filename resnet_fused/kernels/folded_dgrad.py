"""Gradients w.r.t. the inputs of one or both folded convolutions of a block: da = dz scaled + a matrix^T + vector.

For each one GEMM over [dz | a]; dz, the gradient before the block's last ReLU, is read once for both. The epilogue
computes the partial sums that backward of the input's batch norm needs.
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
    weight_matrix,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.bn_coeffs import with_bn_coeffs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.kernels.tiles import (
    load_activation_tile,
    load_masked_tile,
    load_tile,
    store_tile,
    store_tile_sums,
    unravel_pixels,
)
from resnet_fused.layout import new_activation
from resnet_fused.types import Activation, DgradFactors, Pair


@triton.jit
def _input_gradient(
    g,  # (pixels, outputs)
    mask,  # (pixels, bytes or words)
    scaled,  # (outputs, channels)
    matrix,  # (channels, channels) or None
    vector,  # (channels,) or None
    a,  # Activation (tiles), x: (N, height, width, channels)
    da,  # (pixels, channels)
    tile_sums,  # (2, channels, tiles_m) or None
    height,
    width,
    channels,  # of x and da
    out_height,
    out_width,
    outputs,  # channels of dz
    pixels,
    input_stride_h,
    input_stride_w,
    tile_m,
    tiles_m,
    tile_n,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes and stores one tile of da; parameters as in folded_dgrad_kernel."""
    pixel_offs = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column_offs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel_valid, column_valid = pixel_offs < pixels, column_offs < channels
    if tile_sums is not None:  # loaded before the loops, which hide the latency
        x_tile = load_tile(a[0], pixel_offs, pixel_valid, column_offs, channels)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first_output in range(0, outputs, BLOCK_K):
        output_offs = first_output + tl.arange(0, BLOCK_K)
        dz = load_masked_tile(g, mask, pixel_offs, pixel_valid, first_output, outputs, BLOCK_K)
        w = load_tile(scaled, output_offs, output_offs < outputs, column_offs, channels)
        acc = tl.dot(tl.trans(w), tl.trans(dz), acc, input_precision=PRECISION)
    if matrix is not None:
        x_offs = pixel_offs
        if not POINTWISE:
            image, h, w = unravel_pixels(pixel_offs, out_height, out_width)
            x_offs = (image * height + h * input_stride_h) * width + w * input_stride_w
        for first_channel in range(0, channels, BLOCK_K):
            channel_offs = first_channel + tl.arange(0, BLOCK_K)
            a_tile = load_activation_tile(a, x_offs, pixel_valid, channel_offs, channels, False)
            m = load_tile(matrix, column_offs, column_valid, channel_offs, channels)
            acc = tl.dot(m, tl.trans(a_tile), acc, input_precision=PRECISION)
        acc += tl.load(vector + column_offs, column_valid, 0.0)[:, None]
    out = tl.trans(acc).to(da.dtype.element_ty)
    store_tile(da, out, pixel_offs, pixel_valid, column_offs, channels)
    if tile_sums is not None:
        store_tile_sums(
            out.to(tl.float32), x_tile, a[1], a[2], tile_sums, tile_m, tiles_m, pixel_valid, column_offs, channels
        )  # fmt: skip


@triton.jit
def folded_dgrad_kernel(
    g,  # (N, out_height, out_width, outputs)
    mask,  # (pixels, bytes or words)
    scaled,  # (outputs, channels)
    matrix,  # (channels, channels) or None
    vector,  # (channels,) or None
    x,  # (N, height, width, channels)
    x_mean,  # (channels,) or None
    x_bn_coeffs,  # (3, channels) or None
    x_shift,  # (channels,) or None
    da,  # (N, out_height, out_width, channels)
    tile_sums,  # (2, channels, tiles of pixels) float32, see ``store_tile_sums``; or None
    skip_scaled,  # (outputs, skip_channels) or None
    skip_matrix,  # (skip_channels, skip_channels) or None
    skip_vector,  # (skip_channels,) or None
    skip,  # (N, skip_height, skip_width, skip_channels) or None
    skip_shift,  # (skip_channels,) or None
    dskip,  # (N, out_height, out_width, skip_channels) or None
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
    BLOCK_N: tl.constexpr,  # channels of da
    BLOCK_K: tl.constexpr,  # outputs, and channels of a
):
    # Tiles of the same pixels are neighbors, the shortcut's last: they read the same part of g.
    tiles = tl.cdiv(channels, BLOCK_N)
    all_tiles = tiles
    if skip is not None:
        all_tiles += tl.cdiv(skip_channels, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // all_tiles, tl.program_id(0) % all_tiles
    tiles_m = tl.num_programs(0) // all_tiles
    if tile_n < tiles:
        _input_gradient(
            g, mask, scaled, matrix, vector, (x, x_mean, x_bn_coeffs, x_shift), da, tile_sums,
            height, width, channels, out_height, out_width, outputs, pixels,
            input_stride_h, input_stride_w, tile_m, tiles_m, tile_n,
            POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif skip is not None:
        _input_gradient(
            g, mask, skip_scaled, skip_matrix, skip_vector, (skip, None, None, skip_shift), dskip, None,
            skip_height, skip_width, skip_channels, out_height, out_width, outputs, pixels,
            skip_input_stride_h, skip_input_stride_w, tile_m, tiles_m, tile_n - tiles,
            SKIP_POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def _factor_arguments(factors: DgradFactors, like: Tensor, prefix: str = "") -> dict[str, Tensor | None]:
    scaled, matrix = (None if m is None else weight_matrix(m, like.dtype) for m in factors[:2])
    return {f"{prefix}scaled": scaled, f"{prefix}matrix": matrix, f"{prefix}vector": factors.vector}


def configs(
    grad: Tensor,
    mask: Tensor,
    factors: DgradFactors,
    a: Activation,
    input_stride: Pair,
    skip_factors: DgradFactors,
    skip: Activation | None,
    *_: object,
) -> list[Config]:
    outputs, channels = grad.shape[1], a.x.shape[1] + (0 if skip is None else skip.x.shape[1])
    return gemm_configs(grad, grad.numel() // outputs, channels, outputs, epilogue=2)


def folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: DgradFactors,
    a: Activation,
    input_stride: Pair,
    skip_factors: DgradFactors,
    skip: Activation | None,
    skip_input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """da, dskip and the sums of a's batch norm; see reference.folded_conv_bn.folded_dgrad.

    Args:
        grad: (N, outputs, H, W), channels_last; mask: uint8 (N*H*W, ceil(outputs / 8)).
        a, skip: inputs of folded convolutions with H x W pixels after subsampling, channels_last. ``skip`` has no
            statistics.
        factors: of ``a``: scaled (outputs, C, 1, 1), matrix (C, C, 1, 1), vector (C,) float32; skip_factors likewise.

    Returns:
        da: (N, C, H, W) and dskip: (N, skip's channels, H, W) or None, channels_last.
        sum_dz, sum_dz_xhat: (C,) and dy_coeffs: (3, C), float32; None where ``a`` has no statistics.
    """
    a = with_bn_coeffs(a)
    x, (images, _, height, width) = a.x, grad.shape
    channels, skip_channels = x.shape[1], 0 if skip is None else skip.x.shape[1]
    pixels = images * height * width
    da = new_activation(x, channels, height, width)
    dskip = None if skip is None else new_activation(x, skip_channels, height, width)
    tiles = cdiv(pixels, config.block_m)
    tile_sums = None if a.mean is None else new_sums(x, 2, channels, tiles)
    matrices = (*factors[:2], *skip_factors[:2])
    Launch(
        folded_dgrad_kernel,
        (tiles * (cdiv(channels, config.block_n) + cdiv(skip_channels, config.block_n)),),
        {
            "g": grad, "mask": mask_words(mask, grad.shape[1], config.block_k), **_factor_arguments(factors, grad),
            **activation_arguments(a), "da": da, "tile_sums": tile_sums,
            **_factor_arguments(skip_factors, grad, "skip_"), **skip_arguments(skip), "dskip": dskip,
            **folded_size_arguments(a, input_stride, skip, skip_input_stride, grad),
        },
        {
            "POINTWISE": input_stride == (1, 1), "SKIP_POINTWISE": skip_input_stride == (1, 1),
            "PRECISION": precision(grad.dtype), **config.blocks(),
        },
        config,
        flops=2 * pixels * sum(m.numel() for m in matrices if m is not None),
        partial_bytes=subsampled_bytes(height, width, x=x, skip=None if skip is None else skip.x),
    ).start()  # fmt: skip
    return da, dskip, *((None, None, None) if tile_sums is None else reductions.sum_tiles(tile_sums, a))
