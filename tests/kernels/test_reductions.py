"""Merges of partial sums against float64, also where a program's loop takes several steps; coefficients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels import bn_coeffs, reductions
from resnet_fused.types import Activation, Gradient
from tests.kernels.devices import DEVICES

EPS = 1e-5
#: Tiles, from one to more than a program loads at once.
TILES = [1, 3, 90, 4500]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double().cpu(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


def check_bn_coeffs(coeffs: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor, beta: Tensor) -> None:
    """Each row by itself: in float64 but for the scale as it is rounded, which both maps share."""
    scale, bias, offset = coeffs
    close(scale, (invstd.double() * gamma.double()).cpu())
    assert torch.equal(bias, beta)
    close(offset, (beta.double() - mean.double() * scale.double()).cpu())


def check_dy_coeffs(coeffs: Tensor, sums: tuple[Tensor, Tensor], a: Activation, pixels: int) -> None:
    assert a.mean is not None and a.invstd is not None and a.bn_coeffs is not None
    mean, invstd, scale = (x.double() for x in (a.mean, a.invstd, a.bn_coeffs[0]))
    sum_dz, sum_dz_xhat = (x.double() for x in sums)
    slope, level, offset = coeffs
    close(slope, (sum_dz_xhat * invstd / pixels * scale).cpu())
    close(level, (sum_dz / pixels * scale).cpu())
    close(offset, (sum_dz / pixels * scale - mean * slope.double()).cpu())


def normed_activation(channels: int, device: str, affine: bool = True) -> Activation:
    """A batch norm's input of 30 pixels, without bn_coeffs."""
    mean, gamma, beta = torch.randn(3, channels, device=device)
    more = (gamma, beta) if affine else (None, None)
    x = torch.randn(2, channels, 3, 5, device=device)
    return Activation(x, mean, torch.rand(channels, device=device), *more)


@pytest.mark.parametrize("level", [0.0, 1e3])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("count", TILES)
@pytest.mark.parametrize("device", DEVICES)
def test_norm_statistics(device: str, count: int, channels: int, level: float) -> None:
    size = 4
    y = torch.randn(count * size - 1, channels, dtype=torch.float64) + level
    y[:, 1] = level
    means = torch.stack([tile.mean(0) for tile in y.split(size)]).float()
    deviations = [tile - mean for tile, mean in zip(y.split(size), means.double(), strict=True)]
    sums = torch.stack([d.sum(0) for d in deviations]), torch.stack([d.square().sum(0) for d in deviations])
    tiles = torch.stack([means, *(each.float() for each in sums)]).mT.contiguous().to(device)
    gamma, beta = torch.randn(2, channels, device=device)
    mean, var, invstd, coeffs = reductions.norm_statistics(tiles, size, len(y), EPS, gamma, beta)
    close(mean, y.mean(0))
    torch.testing.assert_close(var.double().cpu(), y.var(0, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(invstd.double().cpu(), (var.double().cpu() + EPS).rsqrt(), rtol=1e-6, atol=0)
    assert var[1] == 0
    check_bn_coeffs(coeffs, mean, invstd, gamma, beta)
    plain = reductions.norm_statistics(tiles, size, len(y), EPS, None, None)[3]
    check_bn_coeffs(plain, mean, invstd, torch.ones_like(mean), torch.zeros_like(mean))


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("count", TILES)
@pytest.mark.parametrize("device", DEVICES)
def test_sum_tiles(device: str, count: int, channels: int) -> None:
    tiles, norm = (
        torch.randn(2, channels, count),
        bn_coeffs.with_bn_coeffs(normed_activation(channels, device)),
    )
    assert norm.invstd is not None
    dz, dz_xhat, coeffs = reductions.sum_tiles(tiles.to(device), norm)
    expected = tiles.double().sum(2)
    close(dz, expected[0])
    close(dz_xhat, expected[1] * norm.invstd.double().cpu())
    check_dy_coeffs(coeffs, (dz, dz_xhat), norm, 30)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [3, 200])
@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_where_they_are_not_given(device: str, channels: int, affine: bool) -> None:
    norm = normed_activation(channels, device, affine)
    sums = torch.randn(channels, device=device), torch.randn(channels, device=device)
    known = bn_coeffs.with_bn_coeffs(norm)
    dy = bn_coeffs.with_dy_coeffs(Gradient(norm.x, None, *norm[:5], *sums))
    assert norm.mean is not None and norm.invstd is not None
    assert known.bn_coeffs is not None and dy.bn_coeffs is not None and dy.dy_coeffs is not None
    assert torch.equal(known.bn_coeffs, dy.bn_coeffs)
    gamma = torch.ones_like(norm.mean) if norm.weight is None else norm.weight
    beta = torch.zeros_like(norm.mean) if norm.bias is None else norm.bias
    check_bn_coeffs(known.bn_coeffs, norm.mean, norm.invstd, gamma, beta)
    check_dy_coeffs(dy.dy_coeffs, sums, known, 30)
    assert bn_coeffs.with_bn_coeffs(known) is known
    assert bn_coeffs.with_dy_coeffs(dy).dy_coeffs is dy.dy_coeffs
    frozen = bn_coeffs.with_dy_coeffs(Gradient(norm.x, None, *norm[:5]))
    assert frozen.bn_coeffs is not None and frozen.dy_coeffs is None


@pytest.mark.parametrize("sizes", [(5, 0, 0), (3000, 0, 7), (40, 300, 7)])
@pytest.mark.parametrize("count", [1, 3, 90, 150])
@pytest.mark.parametrize("device", DEVICES)
def test_sum_splits(device: str, count: int, sizes: tuple[int, int, int]) -> None:
    parts = torch.randn(count, sum(sizes))
    out, *others = (torch.full((size,), torch.nan, device=device) if size else None for size in sizes)
    assert out is not None
    reductions.sum_splits(parts.to(device), out, *others)
    for merged, expected in zip((out, *others), parts.double().sum(0).split(list(sizes)), strict=True):
        if merged is not None:
            close(merged, expected)


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("count", [1, 3, 90, 150])
@pytest.mark.parametrize("device", DEVICES)
def test_covariance(device: str, count: int, channels: int) -> None:
    c = torch.randn(count, 10, channels, dtype=torch.float64) + 0.1
    products = (c.transpose(1, 2) @ c).triu()
    lower = torch.ones_like(products).tril(-1).bool()
    products[lower] = torch.nan  # the lower half is never read
    parts = torch.cat([products.flatten(1), c.sum(1)], 1).float()
    mean, covariance = reductions.covariance_of(parts.to(device), channels, 10 * count)
    flat = c.flatten(0, 1)
    close(mean, flat.mean(0))
    close(covariance, torch.cov(flat.t(), correction=0).view(channels, channels))
