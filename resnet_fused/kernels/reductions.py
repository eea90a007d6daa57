"""What is left of a sum over the pixels once every tile or split has its part: merged in a fixed order, in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.launch import Config, launch

CHANNELS_AT_ONCE, TILES_AT_ONCE = 8, 256
_CONFIG = Config(warps=4, stages=1)


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
    total = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    for first in range(0, COUNT, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        pixels = tl.maximum(tl.minimum(TILE_PIXELS, PIXELS - tile * TILE_PIXELS), 0)
        place = tiles + tile[:, None] * CHANNELS + channels[None, :]
        part = tl.load(place, (tile < COUNT)[:, None] & inside[None, :], other=0.0)
        total += part.to(tl.float64) * pixels[:, None]
    centre = tl.sum(total, 0) / PIXELS
    squares = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    for first in range(0, COUNT, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        pixels = tl.maximum(tl.minimum(TILE_PIXELS, PIXELS - tile * TILE_PIXELS), 0)
        place = tiles + tile[:, None] * CHANNELS + channels[None, :]
        whole = (tile < COUNT)[:, None] & inside[None, :]
        off = tl.load(place, whole, other=0.0).to(tl.float64) - centre[None, :]
        squares += tl.load(place + COUNT * CHANNELS, whole, other=0.0) + off * off * pixels[:, None]
    variance = tl.sum(squares, 0) / PIXELS
    tl.store(mean + channels, centre.to(tl.float32), inside)
    tl.store(var + channels, variance.to(tl.float32), inside)
    tl.store(invstd + channels, (1.0 / tl.sqrt(variance + eps)).to(tl.float32), inside)


def norm_statistics(
    tiles: Tensor, tile_pixels: int, pixels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, biased variance and 1/sqrt(var + eps), (C,) float32, merged by Chan's formula.

    Args:
        tiles: (2, T, C), of each tile of ``tile_pixels`` pixels mean and sum of squared deviations; the last tile has
            what is left of ``pixels``.
    """
    _, count, channels = tiles.shape
    mean, var, invstd = (tiles.new_empty(channels) for _ in range(3))
    launch(
        norm_statistics_kernel,
        (triton.cdiv(channels, CHANNELS_AT_ONCE),),
        {
            "tiles": tiles, "mean": mean, "var": var, "invstd": invstd,
            "COUNT": count, "CHANNELS": channels, "PIXELS": pixels, "eps": eps,
        },
        {"TILE_PIXELS": tile_pixels, "AT_ONCE": _at_once(count), "BLOCK": CHANNELS_AT_ONCE},
        _CONFIG,
    )  # fmt: skip
    return mean, var, invstd


@triton.jit
def sum_tiles_kernel(
    tiles, invstd, sum_dz, sum_dz_xhat, COUNT, CHANNELS, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    dz = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    dz_centred = tl.zeros((AT_ONCE, BLOCK), tl.float64)
    for first in range(0, COUNT, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        place = tiles + tile[:, None] * CHANNELS + channels[None, :]
        whole = (tile < COUNT)[:, None] & inside[None, :]
        dz += tl.load(place, whole, other=0.0)
        dz_centred += tl.load(place + COUNT * CHANNELS, whole, other=0.0)
    scale = tl.load(invstd + channels, inside, 0.0)
    tl.store(sum_dz + channels, tl.sum(dz, 0).to(tl.float32), inside)
    tl.store(sum_dz_xhat + channels, (tl.sum(dz_centred, 0) * scale).to(tl.float32), inside)


def sum_tiles(tiles: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """sum_dz and sum_dz_xhat, (C,) float32, of the (2, T, C) that ``store_tile_sums`` has written."""
    _, count, channels = tiles.shape
    sum_dz, sum_dz_xhat = tiles.new_empty(channels), tiles.new_empty(channels)
    launch(
        sum_tiles_kernel,
        (triton.cdiv(channels, CHANNELS_AT_ONCE),),
        {
            "tiles": tiles, "invstd": invstd, "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat,
            "COUNT": count, "CHANNELS": channels,
        },
        {"AT_ONCE": _at_once(count), "BLOCK": CHANNELS_AT_ONCE},
        _CONFIG,
    )  # fmt: skip
    return sum_dz, sum_dz_xhat


@triton.jit
def sum_splits_kernel(parts, out, more, last, SPLITS, SIZE, MORE, LAST, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = SIZE + MORE + LAST
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * whole + places, places < whole, other=0.0)
    tl.store(out + places, total, places < SIZE)
    if more is not None:
        tl.store(more + places - SIZE, total, (places >= SIZE) & (places < SIZE + MORE))
    if last is not None:
        tl.store(last + places - SIZE - MORE, total, (places >= SIZE + MORE) & (places < whole))


def sum_splits(parts: Tensor, out: Tensor, more: Tensor | None = None, last: Tensor | None = None) -> None:
    """out, more and last, one behind the other, are the sum over the first dimension of ``parts``."""
    block = 1024
    size, more_size, last_size = (0 if x is None else x.numel() for x in (out, more, last))
    launch(
        sum_splits_kernel,
        (triton.cdiv(size + more_size + last_size, block),),
        {
            "parts": parts, "out": out, "more": more, "last": last,
            "SPLITS": len(parts), "SIZE": size, "MORE": more_size, "LAST": last_size,
        },
        {"BLOCK": block},
        _CONFIG,
    )  # fmt: skip


@triton.jit
def covariance_kernel(parts, mean, covariance, SPLITS, CHANNELS, PIXELS, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.minimum(i[:, None], j[None, :])
    high = tl.maximum(i[:, None], j[None, :])
    inside = (i < CHANNELS)[:, None] & (j < CHANNELS)[None, :]
    squares = tl.zeros((BLOCK, BLOCK), tl.float64)
    sum_i = tl.zeros((BLOCK,), tl.float64)
    sum_j = tl.zeros((BLOCK,), tl.float64)
    size = CHANNELS * CHANNELS
    for split in range(SPLITS):
        part = parts + split * (size + CHANNELS)
        squares += tl.load(part + low * CHANNELS + high, inside, other=0.0)
        sum_i += tl.load(part + size + i, i < CHANNELS, other=0.0)
        sum_j += tl.load(part + size + j, j < CHANNELS, other=0.0)
    mean_i, mean_j = sum_i / PIXELS, sum_j / PIXELS
    value = squares / PIXELS - mean_i[:, None] * mean_j[None, :]
    tl.store(covariance + i[:, None] * CHANNELS + j[None, :], value.to(tl.float32), inside)
    if tl.program_id(1) == 0:
        tl.store(mean + i, mean_i.to(tl.float32), i < CHANNELS)


def covariance_of(parts: Tensor, channels: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Mean (K,) and biased covariance (K, K) from (splits, K*K + K): sums of products, upper half, and of channels."""
    mean, covariance = parts.new_empty(channels), parts.new_empty(channels, channels)
    block = 16
    tiles = triton.cdiv(channels, block)
    launch(
        covariance_kernel,
        (tiles, tiles),
        {
            "parts": parts, "mean": mean, "covariance": covariance,
            "SPLITS": len(parts), "CHANNELS": channels, "PIXELS": pixels,
        },
        {"BLOCK": block},
        _CONFIG,
    )  # fmt: skip
    return mean, covariance


def tile_sums(like: Tensor, tiles: int, channels: int) -> Tensor:
    """Room for two vectors of each tile, (2, T, C)."""
    return torch.empty(2, tiles, channels, dtype=torch.float32, device=like.device)


def _at_once(count: int) -> int:
    return min(TILES_AT_ONCE, triton.next_power_of_2(count))
