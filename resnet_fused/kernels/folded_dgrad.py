"""Gradient of a folded convolution's input: da = dz scaled + c square^T + vector, one GEMM over [dz | c].

dz is the gradient behind the block's ReLU, from the gradient of the output and the mask bits. The epilogue takes the
sums that the batch norm below needs of da behind its ReLU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels import reductions
from resnet_fused.kernels.configs import gemm_configs
from resnet_fused.kernels.launch import Config, launch
from resnet_fused.kernels.problem import (
    every_sizes,
    input_sizes,
    new_activation,
    precision,
    row_matrix,
    touched,
)
from resnet_fused.kernels.tiles import activation_tile, gradient_tile, pixel_of, store_tile_sums
from resnet_fused.reference.operands import Activation, Pair


@triton.jit
def folded_dgrad_kernel(
    g,
    bits,
    scaled,
    x,
    mean,
    invstd,
    weight,
    bias,
    shift,
    square,
    vector,
    da,
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
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """CHANNELS: of the convolution's input, and of da; OUTPUTS: of dz."""
    tiles_n = tl.cdiv(CHANNELS, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, column_inside = rows < PIXELS, columns < CHANNELS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, OUTPUTS, BLOCK_K):
        outputs = first + tl.arange(0, BLOCK_K)
        dz = gradient_tile(
            g, bits, None, None, None, None, None, None, None, PIXELS, rows, inside, first, OUTPUTS, BLOCK_K
        )
        b = tl.load(
            scaled + outputs[:, None] * CHANNELS + columns[None, :],
            (outputs < OUTPUTS)[:, None] & column_inside[None, :],
            other=0.0,
        )
        acc = tl.dot(dz, b, acc, input_precision=PRECISION)
    if square is not None:
        source = rows
        if not POINTWISE:
            image, h, w = pixel_of(rows, OUT_HEIGHT, OUT_WIDTH)
            source = (image * HEIGHT + h * EVERY_H) * WIDTH + w * EVERY_W
        for first in range(0, CHANNELS, BLOCK_K):
            channels = first + tl.arange(0, BLOCK_K)
            c = activation_tile(x, mean, invstd, weight, bias, shift, source, inside, channels, CHANNELS)
            b = tl.load(
                square + columns[None, :] * CHANNELS + channels[:, None],
                (channels < CHANNELS)[:, None] & column_inside[None, :],
                other=0.0,
            )
            acc = tl.dot(c, b, acc, input_precision=PRECISION)
        acc += tl.load(vector + columns, column_inside, 0.0)[None, :]
    out = acc.to(da.dtype.element_ty)
    tl.store(da + rows[:, None] * CHANNELS + columns[None, :], out, inside[:, None] & column_inside[None, :])
    if sums is not None:
        tiles = tl.num_programs(0) // tiles_n
        store_tile_sums(
            out.to(tl.float32),
            x,
            mean,
            invstd,
            weight,
            bias,
            sums,
            tile_m,
            tiles,
            rows,
            inside,
            columns,
            CHANNELS,
        )


def configs(grad: Tensor, bits: Tensor, scaled: Tensor, source: Activation, *_: object) -> list[Config]:
    outputs = grad.shape[1]
    return gemm_configs(grad, grad.numel() // outputs, source.x.shape[1], outputs, epilogue=2)


def folded_dgrad(
    grad: Tensor,
    bits: Tensor,
    scaled: Tensor,
    source: Activation,
    every: Pair,
    square: Tensor | None,
    vector: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """da at every so-manyth pixel of ``source``, and sums if that has statistics; arguments as in reference.passes."""
    x, (images, outputs, height, width) = source.x, grad.shape
    channels, pixels = x.shape[1], images * height * width
    da = new_activation(x, channels, height, width)
    tiles = triton.cdiv(pixels, config.block_m)
    sums = None if source.mean is None else reductions.tile_sums(x, tiles, channels)
    squared = 0 if square is None else square.numel()
    launch(
        folded_dgrad_kernel,
        (tiles * triton.cdiv(channels, config.block_n),),
        {
            "g": grad, "bits": bits, "scaled": row_matrix(scaled, grad.dtype), **source._asdict(),
            "square": None if square is None else row_matrix(square, grad.dtype), "vector": vector,
            "da": da, "sums": sums, **input_sizes(x), "OUT_HEIGHT": height, "OUT_WIDTH": width, "OUTPUTS": outputs,
            "PIXELS": pixels, **every_sizes(every),
        },
        {"POINTWISE": every == (1, 1), "PRECISION": precision(grad.dtype), **config.blocks()},
        config,
        flops=2 * pixels * (scaled.numel() + squared),
        touched=touched("x", x, height, width),
    )  # fmt: skip
    if sums is None or source.invstd is None:
        return da, None, None
    return da, *reductions.sum_tiles(sums, source.invstd)
