"""Merges of the partial sums that tiles and splits of the pixels have written: in a fixed order, mostly in float64.

They are few bytes, but a program that loads hundreds of partial sums one after the other waits for memory each time:
every kernel loads many at once, and the grid has as many programs as the elements of the result allow. The partial sums
of a channel are contiguous, so that one program can merge one channel of thousands of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.bn_coeffs import store_bn_coeffs, store_dy_coeffs
from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.types import Activation

#: Elements that a program loads at once, and the most splits and channels among them.
ELEMENTS, MAX_SPLITS, MAX_CHANNELS = 4096, 64, 8


@triton.jit
def norm_statistics_kernel(
    tile_stats,  # (3, channels, tiles) float32: of each tile the mean, sum of deviations and that of their squares
    gamma,  # (channels,) or None
    beta,  # (channels,) or None
    mean,  # (channels,) float32
    var,  # (channels,) float32
    invstd,  # (channels,) float32
    bn_coeffs,  # (3, channels) float32
    tiles,
    channels,
    pixels,
    eps,
    TILE_PIXELS: tl.constexpr,  # of each tile but the last
    TILES: tl.constexpr,  # loaded at once
    BLOCK: tl.constexpr,  # channels
):
    channel_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel_valid = channel_offs < channels
    # Relative to the first tile's mean, so that cancellation depends only on the spread of the tile means.
    origin = tl.load(tile_stats + channel_offs * tiles, channel_valid, 0.0).to(tl.float64)
    total = tl.zeros((BLOCK, TILES), tl.float64)
    squares = tl.zeros((BLOCK, TILES), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        tile_pixels = tl.maximum(tl.minimum(TILE_PIXELS, pixels - tile * TILE_PIXELS), 0)[None, :]
        pointers = tile_stats + channel_offs[:, None] * tiles + tile[None, :]
        valid = channel_valid[:, None] & (tile < tiles)[None, :]
        offset = tl.load(pointers, valid, other=0.0).to(tl.float64) - origin[:, None]
        tile_sum = tl.load(pointers + channels * tiles, valid, other=0.0)
        tile_squares = tl.load(pointers + 2 * channels * tiles, valid, other=0.0)
        total += tile_sum + offset * tile_pixels
        squares += tile_squares + offset * (2 * tile_sum + offset * tile_pixels)
    shift = tl.sum(total, 1) / pixels
    center = origin + shift
    variance = tl.sum(squares, 1) / pixels - shift * shift
    variance = tl.where(variance < 0.0, 0.0, variance)
    invstd_value = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    tl.store(mean + channel_offs, center.to(tl.float32), channel_valid)
    tl.store(var + channel_offs, variance.to(tl.float32), channel_valid)
    tl.store(invstd + channel_offs, invstd_value, channel_valid)
    store_bn_coeffs(center.to(tl.float32), invstd_value, gamma, beta, bn_coeffs, channel_offs, channels)


def norm_statistics(
    tile_stats: Tensor, tile_pixels: int, pixels: int, eps: float, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the pixels of all tiles.

    Their deviations from a tile's mean as it is rounded to float32 are shifted to the first tile's. The formula is that
    of shifted data in Chan, Golub, LeVeque: Algorithms for computing the sample variance, 1983.

    Args:
        tile_stats: (3, C, T) float32, of each tile of ``tile_pixels`` pixels the mean, the sum of deviations from it as
            it is rounded, and the sum of their squares; the last tile has the rest of ``pixels``.
        gamma, beta: (C,) float32, weight and bias of the batch norm.

    Returns:
        mean, biased var, invstd = 1 / sqrt(var + eps): (C,); bn_coeffs: (3, C); float32.
    """
    _, channels, tiles = tile_stats.shape
    mean, var, invstd = (tile_stats.new_empty(channels) for _ in range(3))
    bn_coeffs = tile_stats.new_empty(3, channels)
    tiles_at_once, block, config = _tiles_at_once(tiles)
    Launch(
        norm_statistics_kernel,
        (cdiv(channels, block),),
        {
            "tile_stats": tile_stats, "gamma": gamma, "beta": beta, "mean": mean, "var": var, "invstd": invstd,
            "bn_coeffs": bn_coeffs, "tiles": tiles, "channels": channels, "pixels": pixels, "eps": eps,
        },
        {"TILE_PIXELS": tile_pixels, "TILES": tiles_at_once, "BLOCK": block},
        config,
    ).start()  # fmt: skip
    return mean, var, invstd, bn_coeffs


@triton.jit
def sum_tiles_kernel(
    tile_sums,  # (2, channels, tiles) float32
    mean,  # (channels,)
    invstd,  # (channels,)
    bn_coeffs,  # (3, channels)
    sum_dz,  # (channels,) float32
    sum_dz_xhat,  # (channels,) float32
    dy_coeffs,  # (3, channels) float32
    tiles,
    channels,
    pixels,
    TILES: tl.constexpr,  # loaded at once
    BLOCK: tl.constexpr,  # channels
):
    channel_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel_valid = channel_offs < channels
    dz = tl.zeros((BLOCK, TILES), tl.float64)
    dz_centered = tl.zeros((BLOCK, TILES), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        pointers = tile_sums + channel_offs[:, None] * tiles + tile[None, :]
        valid = channel_valid[:, None] & (tile < tiles)[None, :]
        dz += tl.load(pointers, valid, other=0.0)
        dz_centered += tl.load(pointers + channels * tiles, valid, other=0.0)
    invstd_value = tl.load(invstd + channel_offs, channel_valid, 0.0)
    total = tl.sum(dz, 1).to(tl.float32)
    total_xhat = (tl.sum(dz_centered, 1) * invstd_value).to(tl.float32)
    tl.store(sum_dz + channel_offs, total, channel_valid)
    tl.store(sum_dz_xhat + channel_offs, total_xhat, channel_valid)
    store_dy_coeffs(
        total, total_xhat, mean, invstd_value, bn_coeffs, dy_coeffs, channel_offs, pixels, channels
    )


def sum_tiles(tile_sums: Tensor, a: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """sum_dz, sum_dz_xhat: (C,) and dy_coeffs: (3, C), float32.

    Args:
        tile_sums: (2, C, T) float32, what tiles.store_tile_sums has stored.
        a: whose batch norm the sums are of, with its bn_coeffs.
    """
    _, channels, tiles = tile_sums.shape
    sum_dz, sum_dz_xhat, dy_coeffs = (tile_sums.new_empty(*size, channels) for size in ((), (), (3,)))
    tiles_at_once, block, config = _tiles_at_once(tiles)
    Launch(
        sum_tiles_kernel,
        (cdiv(channels, block),),
        {
            "tile_sums": tile_sums, "mean": a.mean, "invstd": a.invstd, "bn_coeffs": a.bn_coeffs,
            "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat, "dy_coeffs": dy_coeffs,
            "tiles": tiles, "channels": channels, "pixels": a.x.numel() // channels,
        },
        {"TILES": tiles_at_once, "BLOCK": block},
        config,
    ).start()  # fmt: skip
    return sum_dz, sum_dz_xhat, dy_coeffs


@triton.jit
def sum_splits_kernel(
    partial_sums,  # (splits, size + size2 + size3) float32
    out,  # (size,) float32
    out2,  # (size2,) float32 or None
    out3,  # (size3,) float32 or None
    splits,
    size,
    size2,
    size3,
    SPLITS: tl.constexpr,  # loaded at once
    BLOCK: tl.constexpr,  # elements
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    all_sizes = size + size2 + size3
    sums = tl.zeros((SPLITS, BLOCK), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        valid = (split < splits)[:, None] & (offs < all_sizes)[None, :]
        sums += tl.load(partial_sums + split[:, None] * all_sizes + offs[None, :], valid, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(out + offs, total, offs < size)
    if out2 is not None:
        tl.store(out2 + offs - size, total, (offs >= size) & (offs < size + size2))
    if out3 is not None:
        tl.store(out3 + offs - size - size2, total, (offs >= size + size2) & (offs < all_sizes))


def sum_splits(
    partial_sums: Tensor, out: Tensor, out2: Tensor | None = None, out3: Tensor | None = None
) -> None:
    """Writes the sum over the first dimension of ``partial_sums``, split into ``out``, ``out2`` and ``out3``.

    Args:
        partial_sums: float32, its other dimensions have as many elements as the outputs together.
    """
    splits_at_once = _splits_at_once(len(partial_sums))
    block = min(1024, ELEMENTS // splits_at_once)
    size, size2, size3 = (0 if x is None else x.numel() for x in (out, out2, out3))
    Launch(
        sum_splits_kernel,
        (cdiv(size + size2 + size3, block),),
        {
            "partial_sums": partial_sums, "out": out, "out2": out2, "out3": out3,
            "splits": len(partial_sums), "size": size, "size2": size2, "size3": size3,
        },
        {"SPLITS": splits_at_once, "BLOCK": block},
        Config(warps=4, stages=1),
    ).start()  # fmt: skip


@triton.jit
def covariance_kernel(
    partial_sums,  # (splits, channels * channels + channels) float32, see input_covariance_kernel
    mean,  # (channels,) float32
    covariance,  # (channels, channels) float32
    splits,
    channels,
    pixels,
    SPLITS: tl.constexpr,  # loaded at once
    BLOCK: tl.constexpr,  # channels, of rows and of columns
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.minimum(i[:, None], j[None, :])
    high = tl.maximum(i[:, None], j[None, :])
    valid = (i < channels)[:, None] & (j < channels)[None, :]
    products = tl.zeros((SPLITS, BLOCK, BLOCK), tl.float64)
    sum_i = tl.zeros((SPLITS, BLOCK), tl.float64)
    sum_j = tl.zeros((SPLITS, BLOCK), tl.float64)
    size = channels * channels
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        split_sums, split_valid = partial_sums + split * (size + channels), split < splits
        pointers = split_sums[:, None, None] + (low * channels + high)[None, :, :]
        products += tl.load(pointers, split_valid[:, None, None] & valid[None, :, :], other=0.0)
        channel_sums, split_valid = split_sums[:, None] + size, split_valid[:, None]
        sum_i += tl.load(channel_sums + i[None, :], split_valid & (i < channels)[None, :], other=0.0)
        sum_j += tl.load(channel_sums + j[None, :], split_valid & (j < channels)[None, :], other=0.0)
    mean_i, mean_j = tl.sum(sum_i, 0) / pixels, tl.sum(sum_j, 0) / pixels
    value = tl.sum(products, 0) / pixels - mean_i[:, None] * mean_j[None, :]
    tl.store(covariance + i[:, None] * channels + j[None, :], value.to(tl.float32), valid)
    if tl.program_id(1) == 0:
        tl.store(mean + i, mean_i.to(tl.float32), i < channels)


def covariance_of(partial_sums: Tensor, channels: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased covariance (C, C), float32.

    Args:
        partial_sums: (splits, C*C + C) float32: a^T a, of which the upper half is read, and the sums of a's channels.
    """
    mean, covariance = partial_sums.new_empty(channels), partial_sums.new_empty(channels, channels)
    splits = len(partial_sums)
    splits_at_once = _splits_at_once(max(8, splits) if splits > 2 else splits)
    # Not fewer than 8: 32 bytes are the least that is read from memory.
    block = 8 if splits_at_once * 16 * 16 > ELEMENTS else 16
    blocks = cdiv(channels, block)
    Launch(
        covariance_kernel,
        (blocks, blocks),
        {
            "partial_sums": partial_sums, "mean": mean, "covariance": covariance,
            "splits": splits, "channels": channels, "pixels": pixels,
        },
        {"SPLITS": splits_at_once, "BLOCK": block},
        Config(warps=4, stages=1),
    ).start()  # fmt: skip
    return mean, covariance


def _tiles_at_once(tiles: int) -> tuple[int, int, Config]:
    """Tiles and channels that a program loads at once, and its warps; fewer channels, more programs."""
    tiles_at_once = min(ELEMENTS, _next_power_of_2(tiles))
    block = min(MAX_CHANNELS, ELEMENTS // tiles_at_once)
    return tiles_at_once, block, Config(warps=8 if tiles_at_once * block == ELEMENTS else 4, stages=1)


def _splits_at_once(splits: int) -> int:
    return min(MAX_SPLITS, _next_power_of_2(splits))


def _next_power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()
