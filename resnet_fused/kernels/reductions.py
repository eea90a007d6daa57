"""What is left of a sum over the pixels once every tile or split has its part: merged in a fixed order, in float64.

Few bytes, but a program that goes through hundreds of parts one after the other waits for memory each time: every
kernel loads many parts at once, and there are as many programs as the elements of the result allow. What the tiles of
a channel have found lies side by side, so that a program can have one channel of thousands of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.launch import Config, cdiv, launch

#: Elements that a program loads at once, and of how many splits and channels at most.
ELEMENTS, MOST_SPLITS, MOST_CHANNELS = 4096, 64, 8


@triton.jit
def norm_statistics_kernel(
    tiles,
    mean,
    var,
    invstd,
    COUNT,
    CHANNELS,
    PIXELS,
    eps,
    TILE_PIXELS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    # From the first tile's mean: then sums of squares cancel no more than the tiles differ.
    origin = tl.load(tiles + channels * COUNT, inside, 0.0).to(tl.float64)
    total = tl.zeros((BLOCK, AT_ONCE), tl.float64)
    squares = tl.zeros((BLOCK, AT_ONCE), tl.float64)
    for first in range(0, COUNT, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        pixels = tl.maximum(tl.minimum(TILE_PIXELS, PIXELS - tile * TILE_PIXELS), 0)[None, :]
        place = tiles + channels[:, None] * COUNT + tile[None, :]
        whole = inside[:, None] & (tile < COUNT)[None, :]
        off = tl.load(place, whole, other=0.0).to(tl.float64) - origin[:, None]
        total += off * pixels
        squares += tl.load(place + CHANNELS * COUNT, whole, other=0.0) + off * off * pixels
    shift = tl.sum(total, 1) / PIXELS
    centre = origin + shift
    variance = tl.sum(squares, 1) / PIXELS - shift * shift
    variance = tl.where(variance < 0.0, 0.0, variance)
    tl.store(mean + channels, centre.to(tl.float32), inside)
    tl.store(var + channels, variance.to(tl.float32), inside)
    tl.store(invstd + channels, (1.0 / tl.sqrt(variance + eps)).to(tl.float32), inside)


def norm_statistics(
    tiles: Tensor, tile_pixels: int, pixels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, biased variance and 1/sqrt(var + eps), (C,) float32, merged by Chan's formula.

    Args:
        tiles: (2, C, T), of each tile of ``tile_pixels`` pixels mean and sum of squared deviations; the last tile has
            what is left of ``pixels``.
    """
    _, channels, count = tiles.shape
    mean, var, invstd = (tiles.new_empty(channels) for _ in range(3))
    at_once, block, config = _tiles_at_once(count)
    launch(
        norm_statistics_kernel,
        (cdiv(channels, block),),
        {
            "tiles": tiles, "mean": mean, "var": var, "invstd": invstd,
            "COUNT": count, "CHANNELS": channels, "PIXELS": pixels, "eps": eps,
        },
        {"TILE_PIXELS": tile_pixels, "AT_ONCE": at_once, "BLOCK": block},
        config,
    )  # fmt: skip
    return mean, var, invstd


@triton.jit
def sum_tiles_kernel(
    tiles, invstd, sum_dz, sum_dz_xhat, COUNT, CHANNELS, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    dz = tl.zeros((BLOCK, AT_ONCE), tl.float64)
    dz_centred = tl.zeros((BLOCK, AT_ONCE), tl.float64)
    for first in range(0, COUNT, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        place = tiles + channels[:, None] * COUNT + tile[None, :]
        whole = inside[:, None] & (tile < COUNT)[None, :]
        dz += tl.load(place, whole, other=0.0)
        dz_centred += tl.load(place + CHANNELS * COUNT, whole, other=0.0)
    scale = tl.load(invstd + channels, inside, 0.0)
    tl.store(sum_dz + channels, tl.sum(dz, 1).to(tl.float32), inside)
    tl.store(sum_dz_xhat + channels, (tl.sum(dz_centred, 1) * scale).to(tl.float32), inside)


def sum_tiles(tiles: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """sum_dz and sum_dz_xhat, (C,) float32, of the (2, C, T) that ``store_tile_sums`` has written."""
    _, channels, count = tiles.shape
    sum_dz, sum_dz_xhat = tiles.new_empty(channels), tiles.new_empty(channels)
    at_once, block, config = _tiles_at_once(count)
    launch(
        sum_tiles_kernel,
        (cdiv(channels, block),),
        {
            "tiles": tiles, "invstd": invstd, "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat,
            "COUNT": count, "CHANNELS": channels,
        },
        {"AT_ONCE": at_once, "BLOCK": block},
        config,
    )  # fmt: skip
    return sum_dz, sum_dz_xhat


@triton.jit
def sum_splits_kernel(
    parts, out, more, last, SPLITS, SIZE, MORE, LAST, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = SIZE + MORE + LAST
    sums = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        inside = (split < SPLITS)[:, None] & (places < whole)[None, :]
        sums += tl.load(parts + split[:, None] * whole + places[None, :], inside, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(out + places, total, places < SIZE)
    if more is not None:
        tl.store(more + places - SIZE, total, (places >= SIZE) & (places < SIZE + MORE))
    if last is not None:
        tl.store(last + places - SIZE - MORE, total, (places >= SIZE + MORE) & (places < whole))


def sum_splits(parts: Tensor, out: Tensor, more: Tensor | None = None, last: Tensor | None = None) -> None:
    """out, more and last, one behind the other, are the sum over the first dimension of ``parts``."""
    at_once = _splits_at_once(len(parts))
    block = min(1024, ELEMENTS // at_once)
    size, more_size, last_size = (0 if x is None else x.numel() for x in (out, more, last))
    launch(
        sum_splits_kernel,
        (cdiv(size + more_size + last_size, block),),
        {
            "parts": parts, "out": out, "more": more, "last": last,
            "SPLITS": len(parts), "SIZE": size, "MORE": more_size, "LAST": last_size,
        },
        {"AT_ONCE": at_once, "BLOCK": block},
        Config(warps=4, stages=1),
    )  # fmt: skip


@triton.jit
def covariance_kernel(
    parts, mean, covariance, SPLITS, CHANNELS, PIXELS, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.minimum(i[:, None], j[None, :])
    high = tl.maximum(i[:, None], j[None, :])
    inside = (i < CHANNELS)[:, None] & (j < CHANNELS)[None, :]
    squares = tl.zeros((AT_ONCE, BLOCK, BLOCK), tl.float64)
    sum_i = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    sum_j = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    size = CHANNELS * CHANNELS
    for first in range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        part, there = parts + split * (size + CHANNELS), split < SPLITS
        place = part[:, None, None] + (low * CHANNELS + high)[None, :, :]
        squares += tl.load(place, there[:, None, None] & inside[None, :, :], other=0.0)
        sums, there = part[:, None] + size, there[:, None]
        sum_i += tl.load(sums + i[None, :], there & (i < CHANNELS)[None, :], other=0.0)
        sum_j += tl.load(sums + j[None, :], there & (j < CHANNELS)[None, :], other=0.0)
    mean_i, mean_j = tl.sum(sum_i, 0) / PIXELS, tl.sum(sum_j, 0) / PIXELS
    value = tl.sum(squares, 0) / PIXELS - mean_i[:, None] * mean_j[None, :]
    tl.store(covariance + i[:, None] * CHANNELS + j[None, :], value.to(tl.float32), inside)
    if tl.program_id(1) == 0:
        tl.store(mean + i, mean_i.to(tl.float32), i < CHANNELS)


def covariance_of(parts: Tensor, channels: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean (K,) and biased covariance (K, K) from (splits, K*K + K): sums of products, upper half, and of channels."""
    mean, covariance = parts.new_empty(channels), parts.new_empty(channels, channels)
    at_once = _splits_at_once(max(8, len(parts)) if len(parts) > 2 else len(parts))
    # Of 8 channels are the rows that memory is read in.
    block = 8 if at_once * 16 * 16 > ELEMENTS else 16
    tiles = cdiv(channels, block)
    launch(
        covariance_kernel,
        (tiles, tiles),
        {
            "parts": parts, "mean": mean, "covariance": covariance,
            "SPLITS": len(parts), "CHANNELS": channels, "PIXELS": pixels,
        },
        {"AT_ONCE": at_once, "BLOCK": block},
        Config(warps=4, stages=1),
    )  # fmt: skip
    return mean, covariance


def tile_sums(like: Tensor, tiles: int, channels: int) -> Tensor:
    """Uninitialized (2, C, T): two numbers for each channel of each tile."""
    return torch.empty(2, channels, tiles, dtype=torch.float32, device=like.device)


def _tiles_at_once(count: int) -> tuple[int, int, Config]:
    """Tiles and channels that a program loads at once, and its warps; fewer channels, more programs."""
    at_once = min(ELEMENTS, _power_of_2(count))
    block = min(MOST_CHANNELS, ELEMENTS // at_once)
    return at_once, block, Config(warps=8 if at_once * block == ELEMENTS else 4, stages=1)


def _splits_at_once(count: int) -> int:
    return min(MOST_SPLITS, _power_of_2(count))


def _power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()
