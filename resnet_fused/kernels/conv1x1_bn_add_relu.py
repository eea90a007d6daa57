"""The last ops of a block with a folded 1x1 convolution: relu(bn(a W^T) + shortcut), and the mask of its ReLU.

The batch norm is known before the convolution runs: batch norm, shortcut, ReLU and mask are the epilogue of one GEMM.
The shortcut is the block's input, or the output of a convolution with its batch norm, or a second folded convolution,
which the same program computes after the first one, of every input_stride-th pixel. Where only the shortcut is folded,
``weight`` is None and x is the output of the main path's last convolution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.arguments import (
    activation_arguments,
    mask_words,
    precision,
    subsampled_bytes,
    weight_matrix,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.kernels.tiles import (
    load_activation_tile,
    load_tile,
    store_mask_tile,
    store_tile,
    unravel_pixels,
)
from resnet_fused.layout import mask_shape, new_activation
from resnet_fused.types import Activation, Pair

#: mean, invstd, weight and bias of a batch norm, (C,) each.
BatchNormVectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def _conv1x1(
    a,  # Activation (tiles), x: (pixels of x, channels)
    weight,  # (outputs, channels)
    x_offs,  # (BLOCK_M,)
    x_valid,  # (BLOCK_M,)
    output_offs,  # (BLOCK_N,)
    channels,
    outputs,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # outputs
    BLOCK_K: tl.constexpr,  # channels
):
    """A tile of a W^T, (BLOCK_M, BLOCK_N) float32."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first_channel in range(0, channels, BLOCK_K):
        channel_offs = first_channel + tl.arange(0, BLOCK_K)
        value = load_activation_tile(a, x_offs, x_valid, channel_offs, channels, False)
        b = load_tile(weight, output_offs, output_offs < outputs, channel_offs, channels)
        acc = tl.dot(b, tl.trans(value), acc, input_precision=PRECISION)
    return tl.trans(acc)


@triton.jit
def _bn(value, mean, invstd, weight, bias, output_offs, outputs):
    """bn(value) of a tile (pixels, outputs), float32; mean, invstd: (outputs,); weight, bias: (outputs,) or None."""
    output_valid = output_offs < outputs
    scale = tl.load(invstd + output_offs, output_valid, 0.0)
    if weight is not None:
        scale *= tl.load(weight + output_offs, output_valid, 0.0)
    z = (value - tl.load(mean + output_offs, output_valid, 0.0)[None, :]) * scale[None, :]
    if bias is not None:
        z += tl.load(bias + output_offs, output_valid, 0.0)[None, :]
    return z


@triton.jit
def conv1x1_bn_add_relu_kernel(
    x,  # (pixels, channels), of the output without weight
    x_mean,  # (channels,) or None
    x_bn_coeffs,  # (3, channels) or None
    x_shift,  # (channels,) or None
    weight,  # (outputs, channels) or None
    bn_mean,  # (outputs,), and the next three: the batch norm after the convolution
    bn_invstd,  # (outputs,)
    bn_weight,  # (outputs,) or None
    bn_bias,  # (outputs,) or None
    skip,  # (N, skip_height, skip_width, skip_channels); (pixels, outputs) without skip_weight
    skip_shift,  # (skip_channels,) or None
    skip_weight,  # (outputs, skip_channels) or None
    skip_bn_mean,  # (outputs,), and the next three: the shortcut's batch norm; or None
    skip_bn_invstd,  # (outputs,) or None
    skip_bn_weight,  # (outputs,) or None
    skip_bn_bias,  # (outputs,) or None
    out,  # (N, out_height, out_width, outputs)
    mask,  # (pixels, bytes or words)
    channels,
    skip_channels,
    outputs,
    pixels,  # N * out_height * out_width
    skip_height,
    skip_width,
    out_height,
    out_width,
    input_stride_h,  # of skip
    input_stride_w,
    POINTWISE: tl.constexpr,  # input strides of 1
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # outputs
    BLOCK_K: tl.constexpr,  # channels
):
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    pixel_offs = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output_offs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel_valid = pixel_offs < pixels
    if skip_weight is None:  # loaded before the loop, which hides the latency
        shortcut = load_tile(skip, pixel_offs, pixel_valid, output_offs, outputs)
    if weight is not None:
        z = _conv1x1(
            (x, x_mean, x_bn_coeffs, x_shift), weight, pixel_offs, pixel_valid, output_offs, channels, outputs,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        z = load_tile(x, pixel_offs, pixel_valid, output_offs, outputs).to(tl.float32)
    z = _bn(z, bn_mean, bn_invstd, bn_weight, bn_bias, output_offs, outputs)
    if skip_weight is not None:
        skip_offs = pixel_offs
        if not POINTWISE:
            image, h, w = unravel_pixels(pixel_offs, out_height, out_width)
            skip_offs = (image * skip_height + h * input_stride_h) * skip_width + w * input_stride_w
        shortcut = _conv1x1(
            (skip, None, None, skip_shift), skip_weight, skip_offs, pixel_valid, output_offs, skip_channels, outputs,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if skip_bn_mean is not None:
        shortcut = _bn(
            shortcut, skip_bn_mean, skip_bn_invstd, skip_bn_weight, skip_bn_bias, output_offs, outputs
        )
    z += shortcut
    is_zero = z <= 0
    store_tile(out, tl.where(is_zero, 0.0, z), pixel_offs, pixel_valid, output_offs, outputs)
    valid = pixel_valid[:, None] & (output_offs < outputs)[None, :]
    store_mask_tile(mask, ~is_zero & valid, pixel_offs, pixel_valid, tile_n * BLOCK_N, outputs, BLOCK_N)


def _bn_arguments(bn: BatchNormVectors, prefix: str) -> dict[str, Tensor | None]:
    return {f"{prefix}_{name}": x for name, x in zip(("mean", "invstd", "weight", "bias"), bn, strict=True)}


def configs(
    a: Activation,
    weight: Tensor | None,
    bn: BatchNormVectors,
    skip: Activation,
    skip_weight: Tensor | None,
    *_: object,
) -> list[Config]:
    x = a.x
    outputs = x.shape[1] if weight is None else weight.shape[0]
    gemms = 1 if skip_weight is None else 2
    return gemm_configs(x, x.numel() // x.shape[1], outputs, x.shape[1], epilogue=2, gemms=gemms)


def conv1x1_bn_add_relu(
    a: Activation,
    weight: Tensor | None,
    bn: BatchNormVectors,
    skip: Activation,
    skip_weight: Tensor | None,
    skip_bn: BatchNormVectors,
    input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """relu(bn(conv(a)) + shortcut) and the mask of its ReLU; see reference.folded_conv_bn.conv1x1_bn_add_relu.

    Args:
        a: (N, K, H, W), channels_last; without weight (N, C, H, W).
        weight: (C, K, 1, 1).
        bn: of the convolution; skip_bn: of the shortcut, all None where it has none. (C,) float32.
        skip: (N, C, H, W), channels_last, without statistics; with skip_weight the input of its convolution.
        skip_weight: (C, skip's channels, 1, 1).

    Returns:
        out: (N, C, H, W), channels_last; mask: uint8 (N*H*W, ceil(C / 8)).
    """
    x = a.x
    outputs, (height, width) = x.shape[1] if weight is None else weight.shape[0], x.shape[2:]
    out = new_activation(x, outputs, height, width)
    mask = torch.empty(mask_shape(out), dtype=torch.uint8, device=out.device)
    pixels = x.shape[0] * height * width
    Launch(
        conv1x1_bn_add_relu_kernel,
        (cdiv(pixels, config.block_m) * cdiv(outputs, config.block_n),),
        {
            **activation_arguments(a),
            "weight": None if weight is None else weight_matrix(weight, x.dtype), **_bn_arguments(bn, "bn"),
            "skip": skip.x, "skip_shift": skip.shift,
            "skip_weight": None if skip_weight is None else weight_matrix(skip_weight, x.dtype),
            **_bn_arguments(skip_bn, "skip_bn"),
            "out": out, "mask": mask_words(mask, outputs, config.block_n),
            "channels": x.shape[1], "skip_channels": skip.x.shape[1], "outputs": outputs, "pixels": pixels,
            "skip_height": skip.x.shape[2], "skip_width": skip.x.shape[3], "out_height": height, "out_width": width,
            "input_stride_h": input_stride[0], "input_stride_w": input_stride[1],
        },
        {"POINTWISE": input_stride == (1, 1), "PRECISION": precision(x.dtype), **config.blocks()},
        config,
        flops=2 * pixels * sum(w.numel() for w in (weight, skip_weight) if w is not None),
        partial_bytes=subsampled_bytes(height, width, skip=skip.x),
    ).start()  # fmt: skip
    return out, mask
