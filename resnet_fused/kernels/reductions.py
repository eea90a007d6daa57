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
from resnet_fused.types import Activation, Gradient

#: Elements that a program loads at once, and of how many splits and channels at most.
ELEMENTS, MOST_SPLITS, MOST_CHANNELS = 4096, 64, 8
#: Of a program that merges nothing.
CHANNELS_AT_ONCE = 128


@triton.jit
def _store_terms(mean, invstd, gamma, beta, bn_coeffs, channels, inside, CHANNELS):
    """types.make_bn_coeffs of float32 ``mean`` and ``invstd`` of some channels."""
    scale, bias = invstd, tl.zeros_like(mean)
    if gamma is not None:
        scale *= tl.load(gamma + channels, inside, 0.0)
    if beta is not None:
        bias = tl.load(beta + channels, inside, 0.0)
    offset = bias.to(tl.float64) - mean.to(tl.float64) * scale.to(tl.float64)
    place = bn_coeffs + channels
    tl.store(place, scale, inside)
    tl.store(place + CHANNELS, bias, inside)
    tl.store(place + 2 * CHANNELS, offset.to(tl.float32), inside)


@triton.jit
def _store_slopes(
    sum_dz, sum_dz_xhat, mean, invstd, bn_coeffs, dy_coeffs, channels, inside, PIXELS, CHANNELS
):
    """types.make_dy_coeffs of float32 sums of some channels."""
    factor = tl.load(bn_coeffs + channels, inside, 0.0).to(tl.float64) / PIXELS
    centre = tl.load(mean + channels, inside, 0.0).to(tl.float64)
    slope = (factor * invstd.to(tl.float64) * sum_dz_xhat.to(tl.float64)).to(tl.float32)
    level = factor * sum_dz.to(tl.float64)
    offset = level - centre * slope.to(tl.float64)
    place = dy_coeffs + channels
    tl.store(place, slope, inside)
    tl.store(place + CHANNELS, level.to(tl.float32), inside)
    tl.store(place + 2 * CHANNELS, offset.to(tl.float32), inside)


@triton.jit
def norm_statistics_kernel(
    tiles,
    gamma,
    beta,
    mean,
    var,
    invstd,
    bn_coeffs,
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
    rate = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    tl.store(mean + channels, centre.to(tl.float32), inside)
    tl.store(var + channels, variance.to(tl.float32), inside)
    tl.store(invstd + channels, rate, inside)
    _store_terms(centre.to(tl.float32), rate, gamma, beta, bn_coeffs, channels, inside, CHANNELS)


def norm_statistics(
    tiles: Tensor, tile_pixels: int, pixels: int, eps: float, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, biased variance and 1/sqrt(var + eps), (C,) float32, merged by Chan's formula, and terms, (3, C).

    Args:
        tiles: (2, C, T), of each tile of ``tile_pixels`` pixels mean and sum of squared deviations; the last tile has
            what is left of ``pixels``.
        gamma, beta: weight and bias of the batch norm that the statistics are for, (C,).
    """
    _, channels, count = tiles.shape
    mean, var, invstd = (tiles.new_empty(channels) for _ in range(3))
    bn_coeffs = tiles.new_empty(3, channels)
    at_once, block, config = _tiles_at_once(count)
    launch(
        norm_statistics_kernel,
        (cdiv(channels, block),),
        {
            "tiles": tiles, "gamma": gamma, "beta": beta, "mean": mean, "var": var, "invstd": invstd,
            "bn_coeffs": bn_coeffs, "COUNT": count, "CHANNELS": channels, "PIXELS": pixels, "eps": eps,
        },
        {"TILE_PIXELS": tile_pixels, "AT_ONCE": at_once, "BLOCK": block},
        config,
    )  # fmt: skip
    return mean, var, invstd, bn_coeffs


@triton.jit
def sum_tiles_kernel(
    tiles,
    mean,
    invstd,
    bn_coeffs,
    sum_dz,
    sum_dz_xhat,
    dy_coeffs,
    COUNT,
    CHANNELS,
    PIXELS,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
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
    rate = tl.load(invstd + channels, inside, 0.0)
    total, total_xhat = tl.sum(dz, 1).to(tl.float32), (tl.sum(dz_centred, 1) * rate).to(tl.float32)
    tl.store(sum_dz + channels, total, inside)
    tl.store(sum_dz_xhat + channels, total_xhat, inside)
    _store_slopes(total, total_xhat, mean, rate, bn_coeffs, dy_coeffs, channels, inside, PIXELS, CHANNELS)


def sum_tiles(tiles: Tensor, below: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """sum_dz and sum_dz_xhat, (C,) float32, of the (2, C, T) that ``store_tile_sums`` has written, and slopes, (3, C).

    Args:
        below: whose batch norm the sums are for, with its terms.
    """
    _, channels, count = tiles.shape
    sum_dz, sum_dz_xhat, dy_coeffs = (tiles.new_empty(*size, channels) for size in ((), (), (3,)))
    at_once, block, config = _tiles_at_once(count)
    launch(
        sum_tiles_kernel,
        (cdiv(channels, block),),
        {
            "tiles": tiles, "mean": below.mean, "invstd": below.invstd, "bn_coeffs": below.bn_coeffs,
            "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat, "dy_coeffs": dy_coeffs,
            "COUNT": count, "CHANNELS": channels, "PIXELS": below.x.numel() // channels,
        },
        {"AT_ONCE": at_once, "BLOCK": block},
        config,
    )  # fmt: skip
    return sum_dz, sum_dz_xhat, dy_coeffs


@triton.jit
def terms_kernel(mean, invstd, gamma, beta, bn_coeffs, CHANNELS, BLOCK: tl.constexpr):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    centre, rate = tl.load(mean + channels, inside, 0.0), tl.load(invstd + channels, inside, 0.0)
    _store_terms(centre, rate, gamma, beta, bn_coeffs, channels, inside, CHANNELS)


def bn_coeffs_of(mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """types.make_bn_coeffs of statistics that ``norm_statistics`` has not made."""
    bn_coeffs = mean.new_empty(3, len(mean))
    launch(
        terms_kernel,
        (cdiv(len(mean), CHANNELS_AT_ONCE),),
        {
            "mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta, "bn_coeffs": bn_coeffs,
            "CHANNELS": len(mean),
        },
        {"BLOCK": CHANNELS_AT_ONCE},
        Config(warps=4, stages=1),
    )  # fmt: skip
    return bn_coeffs


def with_bn_coeffs(source: Activation) -> Activation:
    if source.mean is None or source.invstd is None or source.bn_coeffs is not None:
        return source
    return source._replace(bn_coeffs=bn_coeffs_of(source.mean, source.invstd, source.weight, source.bias))


@triton.jit
def slopes_kernel(
    sum_dz, sum_dz_xhat, mean, invstd, bn_coeffs, dy_coeffs, CHANNELS, PIXELS, BLOCK: tl.constexpr
):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    total, total_xhat = tl.load(sum_dz + channels, inside, 0.0), tl.load(sum_dz_xhat + channels, inside, 0.0)
    rate = tl.load(invstd + channels, inside, 0.0)
    _store_slopes(total, total_xhat, mean, rate, bn_coeffs, dy_coeffs, channels, inside, PIXELS, CHANNELS)


def dy_coeffs_of(
    sum_dz: Tensor, sum_dz_xhat: Tensor, mean: Tensor, invstd: Tensor, bn_coeffs: Tensor, pixels: int
) -> Tensor:
    """types.make_dy_coeffs of sums that ``sum_tiles`` has not made."""
    dy_coeffs = torch.empty_like(bn_coeffs)
    launch(
        slopes_kernel,
        (cdiv(len(mean), CHANNELS_AT_ONCE),),
        {
            "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat, "mean": mean, "invstd": invstd, "bn_coeffs": bn_coeffs,
            "dy_coeffs": dy_coeffs, "CHANNELS": len(mean), "PIXELS": pixels,
        },
        {"BLOCK": CHANNELS_AT_ONCE},
        Config(warps=4, stages=1),
    )  # fmt: skip
    return dy_coeffs


def with_dy_coeffs(dy: Gradient) -> Gradient:
    """With terms too."""
    if dy.mean is None or dy.invstd is None or dy.y is None:
        return dy
    bn_coeffs, dy_coeffs = dy.bn_coeffs, dy.dy_coeffs
    if bn_coeffs is None:
        bn_coeffs = bn_coeffs_of(dy.mean, dy.invstd, dy.weight, dy.bias)
    if dy_coeffs is None and dy.sum_dz is not None and dy.sum_dz_xhat is not None:
        pixels = dy.y.numel() // dy.y.shape[1]
        dy_coeffs = dy_coeffs_of(dy.sum_dz, dy.sum_dz_xhat, dy.mean, dy.invstd, bn_coeffs, pixels)
    return dy._replace(bn_coeffs=bn_coeffs, dy_coeffs=dy_coeffs)


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
