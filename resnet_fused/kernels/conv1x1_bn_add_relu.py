"""The end of a block with a folded convolution: relu(bn(c W^T) + shortcut), with mask bits.

The batch norm is known before the convolution runs, so its affine map, the shortcut, the ReLU and the bits are the
epilogue of one GEMM. The shortcut is the block's input, or another output with its batch norm, or a second folded
convolution that the same program makes, one after the other, at pixels EVERY_H and EVERY_W apart. Where only the
shortcut is folded, ``conv`` is None and x is the output of the convolution before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.arguments import (
    activation_fields,
    every_sizes,
    mask_words,
    new_activation,
    precision,
    row_matrix,
    touched,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.launch import Config, cdiv, launch
from resnet_fused.kernels.tiles import activation_tile, pixel_of, store_bits, tile_of
from resnet_fused.layout import mask_shape
from resnet_fused.types import Activation, Pair


@triton.jit
def _product(
    x,
    mean,
    bn_coeffs,
    shift,
    conv,
    source,
    inside,
    outputs,
    CHANNELS,
    OUTPUTS,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, CHANNELS, BLOCK_K):
        channels = first + tl.arange(0, BLOCK_K)
        a = activation_tile(x, mean, bn_coeffs, shift, source, inside, channels, CHANNELS, False)
        b = tl.load(
            conv + outputs[:, None] * CHANNELS + channels[None, :],
            (channels < CHANNELS)[None, :] & (outputs < OUTPUTS)[:, None],
            other=0.0,
        )
        acc = tl.dot(b, tl.trans(a), acc, input_precision=PRECISION)
    return tl.trans(acc)


@triton.jit
def _normed(value, mean, invstd, weight, bias, outputs, OUTPUTS):
    """bn(value) of float32 values."""
    inside = outputs < OUTPUTS
    scale = tl.load(invstd + outputs, inside, 0.0)
    if weight is not None:
        scale *= tl.load(weight + outputs, inside, 0.0)
    z = (value - tl.load(mean + outputs, inside, 0.0)[None, :]) * scale[None, :]
    if bias is not None:
        z += tl.load(bias + outputs, inside, 0.0)[None, :]
    return z


@triton.jit
def conv1x1_bn_add_relu_kernel(
    x,
    x_mean,
    x_terms,
    x_shift,
    conv,
    mean,
    invstd,
    weight,
    bias,
    skip,
    skip_shift,
    skip_conv,
    skip_mean,
    skip_invstd,
    skip_weight,
    skip_bias,
    out,
    mask,
    CHANNELS,
    SKIP_CHANNELS,
    OUTPUTS,
    PIXELS,
    HEIGHT,
    WIDTH,
    OUT_HEIGHT,
    OUT_WIDTH,
    EVERY_H,
    EVERY_W,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(OUTPUTS, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, column_inside = rows < PIXELS, outputs < OUTPUTS
    whole = inside[:, None] & column_inside[None, :]
    if skip_conv is None:  # before the loop, which hides how long that takes
        other = tile_of(skip, rows, inside, outputs, column_inside, OUTPUTS)
    if conv is not None:
        z = _product(
            x, x_mean, x_terms, x_shift, conv, rows, inside, outputs, CHANNELS, OUTPUTS,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        z = tile_of(x, rows, inside, outputs, column_inside, OUTPUTS).to(tl.float32)
    z = _normed(z, mean, invstd, weight, bias, outputs, OUTPUTS)
    if skip_conv is not None:
        source = rows
        if not POINTWISE:
            image, h, w = pixel_of(rows, OUT_HEIGHT, OUT_WIDTH)
            source = (image * HEIGHT + h * EVERY_H) * WIDTH + w * EVERY_W
        other = _product(
            skip, None, None, skip_shift, skip_conv, source, inside, outputs, SKIP_CHANNELS, OUTPUTS,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if skip_mean is not None:
        other = _normed(other, skip_mean, skip_invstd, skip_weight, skip_bias, outputs, OUTPUTS)
    z += other
    held = z <= 0
    tl.store(
        out + rows[:, None] * OUTPUTS + outputs[None, :],
        tl.where(held, 0.0, z).to(out.dtype.element_ty),
        whole,
    )
    store_bits(mask, ~held & whole, rows, inside, tile_n * BLOCK_N, OUTPUTS, BLOCK_N)


#: mean, invstd, weight and bias of a batch norm.
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_VECTORS = ("mean", "invstd", "weight", "bias")


def configs(
    source: Activation,
    conv: Tensor | None,
    norm: Vectors,
    skip: Tensor,
    skip_shift: Tensor | None,
    skip_conv: Tensor | None,
    *_: object,
) -> list[Config]:
    x = source.x
    outputs = x.shape[1] if conv is None else conv.shape[0]
    products = 1 if skip_conv is None else 2
    return gemm_configs(x, x.numel() // x.shape[1], outputs, x.shape[1], epilogue=2, products=products)


def conv1x1_bn_add_relu(
    source: Activation,
    conv: Tensor | None,
    norm: Vectors,
    skip: Tensor,
    skip_shift: Tensor | None,
    skip_conv: Tensor | None,
    skip_norm: Vectors,
    input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """relu(bn(conv(source)) + shortcut) and the mask of its ReLU; arguments as in reference.passes."""
    source, x = reductions.with_bn_coeffs(source), source.x
    outputs, (height, width) = x.shape[1] if conv is None else conv.shape[0], x.shape[2:]
    out = new_activation(x, outputs, height, width)
    mask = torch.empty(mask_shape(out), dtype=torch.uint8, device=out.device)
    pixels = x.shape[0] * height * width
    launch(
        conv1x1_bn_add_relu_kernel,
        (cdiv(pixels, config.block_m) * cdiv(outputs, config.block_n),),
        {
            **activation_fields(source, "x_"),
            "conv": None if conv is None else row_matrix(conv, x.dtype), **dict(zip(_VECTORS, norm, strict=True)),
            "skip": skip, "skip_shift": skip_shift,
            "skip_conv": None if skip_conv is None else row_matrix(skip_conv, x.dtype),
            **{f"skip_{name}": v for name, v in zip(_VECTORS, skip_norm, strict=True)},
            "out": out, "mask": mask_words(mask, outputs, config.block_n),
            "CHANNELS": x.shape[1], "SKIP_CHANNELS": skip.shape[1], "OUTPUTS": outputs,
            "PIXELS": pixels, "HEIGHT": skip.shape[2], "WIDTH": skip.shape[3],
            "OUT_HEIGHT": height, "OUT_WIDTH": width, **every_sizes(input_stride),
        },
        {"POINTWISE": input_stride == (1, 1), "PRECISION": precision(x.dtype), **config.blocks()},
        config,
        flops=2 * pixels * sum(w.numel() for w in (conv, skip_conv) if w is not None),
        touched=touched("skip", skip, height, width),
    )  # fmt: skip
    return out, mask
