"""Gradient w.r.t. a convolution's input, computed as a gather: each input pixel sums over the outputs that it affects.

The prologue computes dy. The epilogue adds the gradient that comes through the shortcut, or computes the partial sums
that backward of the input's batch norm needs.

With a stride, an input pixel contributes to outputs only through the kernel positions (taps) that match its row and
column modulo the stride. A program works on pixels of one residue, and its loop has the taps of that residue alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    conv_size_arguments,
    geometry_arguments,
    gradient_arguments,
    is_pointwise,
    mask_words,
    new_sums,
    precision,
    weight_matrix,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.bn_coeffs import with_bn_coeffs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.kernels.tiles import (
    advance_tap,
    load_gradient_coeffs,
    load_gradient_tile,
    load_masked_tile,
    load_tile,
    runtime_zero,
    store_tile_sums,
    unravel_pixels,
    valid_taps,
)
from resnet_fused.layout import new_activation
from resnet_fused.types import Activation, ConvGeometry, Gradient, Pair


@triton.jit
def dgrad_kernel(
    g,  # (N, out_height, out_width, outputs)
    mask,  # (N * out_height * out_width, bytes or words) or None
    y,  # (N, out_height, out_width, outputs) or None
    y_mean,  # (outputs,) or None
    y_bn_coeffs,  # (3, outputs) or None
    dy_coeffs,  # (3, outputs) or None
    weight,  # (outputs, KERNEL_H, KERNEL_W, channels)
    da,  # (N, height, width, channels)
    x,  # (N, height, width, channels), and the next three: the input and its batch norm; or None
    x_mean,  # (channels,) or None
    x_bn_coeffs,  # (3, channels) or None
    tile_sums,  # (2, channels, tiles) float32, see ``store_tile_sums``; or None
    residual,  # (N, ceil(height / input_stride_h), ceil(width / input_stride_w), channels) or None
    residual_mask,  # (pixels of residual, bytes or words) or None
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    images,  # N
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    input_stride_h,  # of the residual
    input_stride_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    POINTWISE: tl.constexpr,  # 1x1, stride 1, no padding
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels of one residue
    BLOCK_N: tl.constexpr,  # channels
    BLOCK_K: tl.constexpr,  # outputs
):
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    residue_h, residue_w = tl.program_id(1) // stride_w, tl.program_id(1) % stride_w
    residue_height, residue_width = tl.cdiv(height, stride_h), tl.cdiv(width, stride_w)
    residue_offs = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_offs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image, h, w = unravel_pixels(residue_offs, residue_height, residue_width)
    h, w = h * stride_h + residue_h, w * stride_w + residue_w
    pixel_valid = (image < images) & (h < height) & (w < width)
    pixel_offs = (image * height + h) * width + w
    # The taps of this residue. With a stride above 1 the dilation is 1.
    tap_h, tap_w = (residue_h + pad_h) % stride_h, (residue_w + pad_w) % stride_w
    taps_h, taps_w = tl.cdiv(KERNEL_H - tap_h, stride_h), tl.cdiv(KERNEL_W - tap_w, stride_w)
    if POINTWISE:
        dy_offs, dy_valid = pixel_offs, pixel_valid
    else:
        # Dividends are multiples of the stride, and none is negative.
        out_h, out_w = (h + pad_h - tap_h) // stride_h, (w + pad_w - tap_w) // stride_w
        corner = (image * out_height + out_h) * out_width + out_w
        valid_h = tl.where(pixel_valid, valid_taps(out_h, -dilation_h, out_height, KERNEL_H), 0)
        valid_w = valid_taps(out_w, -dilation_w, out_width, KERNEL_W)
    valid = pixel_valid[:, None] & (channel_offs < channels)[None, :]
    # Operands of the epilogue are loaded before the loop, which hides their latency.
    if residual is not None:
        residual_valid = pixel_valid & (h % input_stride_h == 0) & (w % input_stride_w == 0)
        residual_width = (width + input_stride_w - 1) // input_stride_w
        residual_height = (height + input_stride_h - 1) // input_stride_h
        residual_offs = (image * residual_height + h // input_stride_h) * residual_width + w // input_stride_w
        residual_tile = load_masked_tile(
            residual, residual_mask, residual_offs, residual_valid, tile_n * BLOCK_N, channels, BLOCK_N
        )
    if tile_sums is not None:
        x_tile = load_tile(x, pixel_offs, pixel_valid, channel_offs, channels)
    dy, zero = (g, mask, y, y_mean, y_bn_coeffs, dy_coeffs), runtime_zero(images)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    i, j, first_output = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(outputs, BLOCK_K)):
        output_offs = first_output + tl.arange(0, BLOCK_K)
        r, s = tap_h + i * stride_h, tap_w + j * stride_w
        if not POINTWISE:
            dy_offs = corner - (i * dilation_h * out_width + j * dilation_w)
            dy_valid = ((valid_h >> i) & (valid_w >> j) & 1) != 0
        coeffs = load_gradient_coeffs(dy, output_offs, outputs)
        dy_tile = load_gradient_tile(
            dy, coeffs, zero, dy_offs, dy_valid, first_output, outputs, BLOCK_K, not POINTWISE
        )
        weight_offs = output_offs * (KERNEL_H * KERNEL_W) + r * KERNEL_W + s
        b = load_tile(weight, weight_offs, output_offs < outputs, channel_offs, channels)
        acc = tl.dot(tl.trans(b), tl.trans(dy_tile), acc, input_precision=PRECISION)
        if KERNEL_H * KERNEL_W > 1:
            i, j, first_output = advance_tap(i, j, first_output, outputs, taps_w, BLOCK_K)
        else:
            first_output += BLOCK_K
    acc = tl.trans(acc)
    if residual is not None:
        acc += residual_tile
    out = acc.to(da.dtype.element_ty)
    tl.store(da + pixel_offs[:, None] * channels + channel_offs[None, :], out, valid)
    if tile_sums is not None:
        tile = tl.program_id(1) * (tl.num_programs(0) // tiles_n) + tile_m
        store_tile_sums(
            out.to(tl.float32), x_tile, x_mean, x_bn_coeffs, tile_sums, tile,
            tl.num_programs(0) // tiles_n * tl.num_programs(1), pixel_valid, channel_offs, channels,
        )  # fmt: skip


def _pixels_per_residue(x: Tensor, geometry: ConvGeometry) -> int:
    return x.shape[0] * cdiv(x.shape[2], geometry.stride[0]) * cdiv(x.shape[3], geometry.stride[1])


def configs(dy: Gradient, weight: Tensor, geometry: ConvGeometry, a: Activation, *_: object) -> list[Config]:
    outputs, channels, *kernel = weight.shape
    taps = cdiv(kernel[0] * kernel[1], geometry.stride[0] * geometry.stride[1])
    pixels, loaded = _pixels_per_residue(a.x, geometry), 1 if dy.y is None else 2
    return gemm_configs(a.x, pixels, channels, outputs, taps=taps, loaded=loaded, epilogue=2)


def dgrad(
    dy: Gradient,
    weight: Tensor,
    geometry: ConvGeometry,
    a: Activation,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """da (+ residual) and, where ``a`` has statistics, the sums of its batch norm; see reference.conv_bn.dgrad.

    Args:
        dy: (N, outputs, H', W'), channels_last.
        weight: (outputs, C, kh, kw).
        a: the convolution's input, (N, C, H, W), channels_last.
        residual: (N, C, ceil(H / input_stride[0]), ceil(W / input_stride[1])), channels_last.
        residual_mask: uint8 (pixels of residual, ceil(C / 8)).

    Returns:
        da: (N, C, H, W), channels_last.
        sum_dz, sum_dz_xhat: (C,) and dy_coeffs: (3, C), float32; or None.
    """
    a, x = with_bn_coeffs(a), a.x
    da = new_activation(x, x.shape[1], x.shape[2], x.shape[3])
    residues = geometry.stride[0] * geometry.stride[1]
    tiles = cdiv(_pixels_per_residue(x, geometry), config.block_m)
    tile_sums = None if a.mean is None else new_sums(x, 2, x.shape[1], residues * tiles)
    outputs, _, *kernel = weight.shape
    Launch(
        dgrad_kernel,
        (tiles * cdiv(x.shape[1], config.block_n), residues),
        {
            **gradient_arguments(dy, config.block_k), "weight": weight_matrix(weight, x.dtype), "da": da,
            "x": None if tile_sums is None else x, "x_mean": a.mean, "x_bn_coeffs": a.bn_coeffs,
            "tile_sums": tile_sums,
            "residual": residual, "residual_mask": mask_words(residual_mask, x.shape[1], config.block_n),
            **conv_size_arguments(x, dy.g), "images": x.shape[0], **geometry_arguments(geometry),
            "input_stride_h": input_stride[0], "input_stride_w": input_stride[1],
        },
        {
            "KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "POINTWISE": is_pointwise(weight, geometry),
            "PRECISION": precision(x.dtype), **config.blocks(),
        },
        config,
        flops=2 * (dy.g.numel() // outputs) * weight.numel(),
    ).start()  # fmt: skip
    return da, *((None, None, None) if tile_sums is None else reductions.sum_tiles(tile_sums, a))
