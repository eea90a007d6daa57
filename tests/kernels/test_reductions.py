"""The merges of tiles and splits against float64, also where a program has to go on several times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels import reductions
from tests.kernels.devices import DEVICES

EPS = 1e-5
#: Tiles or splits, from one to more than a program loads at once.
COUNTS = [1, 3, 90, 4500]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double().cpu(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("level", [0.0, 1e3])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("device", DEVICES)
def test_norm_statistics(device: str, count: int, channels: int, level: float) -> None:
    size = 4
    y = torch.randn(count * size - 1, channels, dtype=torch.float64) + level
    y[:, 1] = level
    means = torch.stack([tile.mean(0) for tile in y.split(size)]).float()
    squares = [
        (tile - mean).square().sum(0) for tile, mean in zip(y.split(size), means.double(), strict=True)
    ]
    tiles = torch.stack([means, torch.stack(squares).float()]).mT.contiguous().to(device)
    mean, var, invstd = reductions.norm_statistics(tiles, size, len(y), EPS)
    close(mean, y.mean(0))
    expected = y.var(0, correction=0)
    # A tile's mean is rounded to float32; nothing else may be lost.
    torch.testing.assert_close(
        var.double().cpu(), expected, rtol=1e-6, atol=2 * level * level * 2.0**-24 / 10
    )
    torch.testing.assert_close(invstd.double().cpu(), (var.double().cpu() + EPS).rsqrt(), rtol=1e-6, atol=0)
    assert var[1] == 0


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("device", DEVICES)
def test_sum_tiles(device: str, count: int, channels: int) -> None:
    tiles, invstd = torch.randn(2, channels, count), torch.rand(channels)
    dz, dz_xhat = reductions.sum_tiles(tiles.to(device), invstd.to(device))
    expected = tiles.double().sum(2)
    close(dz, expected[0])
    close(dz_xhat, expected[1] * invstd.double())


@pytest.mark.parametrize("sizes", [(5, 0, 0), (3000, 0, 7), (40, 300, 7)])
@pytest.mark.parametrize("count", [1, 3, 90, 150])
@pytest.mark.parametrize("device", DEVICES)
def test_sum_splits(device: str, count: int, sizes: tuple[int, int, int]) -> None:
    parts = torch.randn(count, sum(sizes))
    out, *others = (torch.full((size,), torch.nan, device=device) if size else None for size in sizes)
    assert out is not None
    reductions.sum_splits(parts.to(device), out, *others)
    for found, expected in zip((out, *others), parts.double().sum(0).split(list(sizes)), strict=True):
        if found is not None:
            close(found, expected)


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("count", [1, 3, 90, 150])
@pytest.mark.parametrize("device", DEVICES)
def test_covariance(device: str, count: int, channels: int) -> None:
    c = torch.randn(count, 10, channels, dtype=torch.float64) + 0.1
    products = (c.transpose(1, 2) @ c).triu()
    below = torch.ones_like(products).tril(-1).bool()
    products[below] = torch.nan  # the lower half is never read
    parts = torch.cat([products.flatten(1), c.sum(1)], 1).float()
    mean, covariance = reductions.covariance_of(parts.to(device), channels, 10 * count)
    flat = c.flatten(0, 1)
    close(mean, flat.mean(0))
    close(covariance, torch.cov(flat.t(), correction=0).view(channels, channels))
