"""Gradients of the inputs of one or both folded convolutions of a block: da = dz scaled + c matrix^T + vector.

For each one GEMM over [dz | c]; dz, the gradient behind the block's ReLU, is read once for both. The epilogue takes the
sums that the batch norm below needs of da behind its ReLU.
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
    new_activation,
    precision,
    row_matrix,
    skip_fields,
    touched_of_both,
)
from resnet_fused.kernels.autotune.heuristics import gemm_configs
from resnet_fused.kernels.launch import Config, cdiv, launch
from resnet_fused.kernels.tiles import activation_tile, masked_tile, pixel_of, store_tile_sums, tile_of
from resnet_fused.types import Activation, DgradFactors, Pair


@triton.jit
def _input_gradient(
    g,
    mask,
    scaled,
    x,
    mean,
    bn_coeffs,
    shift,
    matrix,
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
    tile_m,
    tiles_m,
    tile_n,
    POINTWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of da. CHANNELS: of the convolution's input, and of da; OUTPUTS: of dz."""
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, column_inside = rows < PIXELS, columns < CHANNELS
    whole = inside[:, None] & column_inside[None, :]
    if sums is not None:  # before the loops, which hide how long that takes
        below = tile_of(x, rows, inside, columns, column_inside, CHANNELS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, OUTPUTS, BLOCK_K):
        outputs = first + tl.arange(0, BLOCK_K)
        dz = masked_tile(g, mask, rows, inside, first, OUTPUTS, BLOCK_K)
        b = tl.load(
            scaled + outputs[:, None] * CHANNELS + columns[None, :],
            (outputs < OUTPUTS)[:, None] & column_inside[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(b), tl.trans(dz), acc, input_precision=PRECISION)
    if matrix is not None:
        source = rows
        if not POINTWISE:
            image, h, w = pixel_of(rows, OUT_HEIGHT, OUT_WIDTH)
            source = (image * HEIGHT + h * EVERY_H) * WIDTH + w * EVERY_W
        for first in range(0, CHANNELS, BLOCK_K):
            channels = first + tl.arange(0, BLOCK_K)
            c = activation_tile(x, mean, bn_coeffs, shift, source, inside, channels, CHANNELS, False)
            b = tl.load(
                matrix + columns[:, None] * CHANNELS + channels[None, :],
                (channels < CHANNELS)[None, :] & column_inside[:, None],
                other=0.0,
            )
            acc = tl.dot(b, tl.trans(c), acc, input_precision=PRECISION)
        acc += tl.load(vector + columns, column_inside, 0.0)[:, None]
    out = tl.trans(acc).to(da.dtype.element_ty)
    tl.store(da + rows[:, None] * CHANNELS + columns[None, :], out, whole)
    if sums is not None:
        store_tile_sums(
            out.to(tl.float32), below, mean, bn_coeffs, sums, tile_m, tiles_m, whole, columns, CHANNELS
        )


@triton.jit
def folded_dgrad_kernel(
    g,
    mask,
    scaled,
    matrix,
    vector,
    x,
    mean,
    bn_coeffs,
    shift,
    da,
    sums,
    skip_scaled,
    skip_matrix,
    skip_vector,
    skip,
    skip_shift,
    dskip,
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
    # Tiles of one row of tiles follow each other, those of the shortcut last: they read the same pixels.
    tiles = tl.cdiv(CHANNELS, BLOCK_N)
    both = tiles
    if skip is not None:
        both += tl.cdiv(SKIP_CHANNELS, BLOCK_N)
    tile_m, tile_n, tiles_m = tl.program_id(0) // both, tl.program_id(0) % both, tl.num_programs(0) // both
    if tile_n < tiles:
        _input_gradient(
            g, mask, scaled, x, mean, bn_coeffs, shift, matrix, vector, da, sums, HEIGHT, WIDTH, CHANNELS,
            OUT_HEIGHT, OUT_WIDTH, OUTPUTS, PIXELS, EVERY_H, EVERY_W, tile_m, tiles_m, tile_n,
            POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif skip is not None:
        _input_gradient(
            g, mask, skip_scaled, skip, None, None, skip_shift, skip_matrix, skip_vector, dskip, None,
            SKIP_HEIGHT, SKIP_WIDTH, SKIP_CHANNELS, OUT_HEIGHT, OUT_WIDTH, OUTPUTS, PIXELS, SKIP_EVERY_H, SKIP_EVERY_W,
            tile_m, tiles_m, tile_n - tiles, SKIP_POINTWISE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def _factors(factors: DgradFactors, like: Tensor, prefix: str = "") -> dict[str, Tensor | None]:
    matrices = (m if m is None else row_matrix(m, like.dtype) for m in (factors.scaled, factors.matrix))
    names = (f"{prefix}scaled", f"{prefix}matrix", f"{prefix}vector")
    return dict(zip(names, (*matrices, factors.vector), strict=True))


def _size(factors: DgradFactors) -> int:
    return sum(m.numel() for m in (factors.scaled, factors.matrix) if m is not None)


def configs(
    grad: Tensor,
    mask: Tensor,
    factors: DgradFactors,
    source: Activation,
    input_stride: Pair,
    skip_factors: DgradFactors,
    skip: Activation | None,
    *_: object,
) -> list[Config]:
    outputs, channels = grad.shape[1], source.x.shape[1] + (0 if skip is None else skip.x.shape[1])
    return gemm_configs(grad, grad.numel() // outputs, channels, outputs, epilogue=2)


def folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: DgradFactors,
    source: Activation,
    input_stride: Pair,
    skip_factors: DgradFactors,
    skip: Activation | None,
    skip_input_stride: Pair,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """da of ``source``, that of ``skip``, and sum_dz, sum_dz_xhat and slopes, where ``source`` has statistics.

    Args:
        grad: (N, outputs, H, W), channels_last; bits: the mask of what it is the gradient of.
        source, skip: inputs of folded convolutions, channels_last; of their pixels one in so many counts, down and
            across, and da is that of these alone. ``skip`` has no statistics.
    """
    source = reductions.with_bn_coeffs(source)
    x, (images, outputs, height, width) = source.x, grad.shape
    channels, others = x.shape[1], 0 if skip is None else skip.x.shape[1]
    pixels = images * height * width
    da = new_activation(x, channels, height, width)
    dskip = None if skip is None else new_activation(x, others, height, width)
    tiles = cdiv(pixels, config.block_m)
    sums = None if source.mean is None else reductions.tile_sums(x, tiles, channels)
    launch(
        folded_dgrad_kernel,
        (tiles * (cdiv(channels, config.block_n) + cdiv(others, config.block_n)),),
        {
            "g": grad, "mask": mask_words(mask, outputs, config.block_k), **_factors(factors, grad),
            **activation_fields(source), "da": da, "sums": sums,
            **_factors(skip_factors, grad, "skip_"), **skip_fields(skip), "dskip": dskip,
            "HEIGHT": x.shape[2], "WIDTH": x.shape[3], "CHANNELS": channels,
            "SKIP_HEIGHT": 0 if skip is None else skip.x.shape[2], "SKIP_WIDTH": 0 if skip is None else skip.x.shape[3],
            "SKIP_CHANNELS": others, "OUT_HEIGHT": height, "OUT_WIDTH": width, "OUTPUTS": outputs, "PIXELS": pixels,
            **every_sizes(input_stride), **every_sizes(skip_input_stride, "SKIP_"),
        },
        {
            "POINTWISE": input_stride == (1, 1), "SKIP_POINTWISE": skip_input_stride == (1, 1),
            "PRECISION": precision(grad.dtype), **config.blocks(),
        },
        config,
        flops=2 * pixels * (_size(factors) + _size(skip_factors)),
        touched=touched_of_both(source, skip, height, width),
    )  # fmt: skip
    return da, dskip, *((None, None, None) if sums is None else reductions.sum_tiles(sums, source))
