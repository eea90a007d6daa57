"""Vectors per channel of a batch norm, in one launch each: its coefficients, those of its gradient, the shift.

Kernels that merge statistics and sums (reductions) compute coefficients too (types.make_bn_coeffs,
types.make_dy_coeffs); these here are for statistics that come from elsewhere: running ones, those of the vendor's
implementation, those of a process group.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.launch import Config, Launch, cdiv
from resnet_fused.types import Activation, Gradient


def _launch_per_channel(kernel: Any, arguments: dict[str, Any]) -> None:
    block = 128  # channels of a program
    grid = (cdiv(arguments["channels"], block),)
    Launch(kernel, grid, arguments, {"BLOCK": block}, Config(warps=4, stages=1)).start()


@triton.jit
def store_bn_coeffs(mean, invstd, gamma, beta, bn_coeffs, channel_offs, channels):
    """types.make_bn_coeffs of the values ``mean`` and ``invstd`` (BLOCK,) float32; gamma, beta: (C,) or None."""
    channel_valid = channel_offs < channels
    scale, bias = invstd, tl.zeros_like(mean)
    if gamma is not None:
        scale *= tl.load(gamma + channel_offs, channel_valid, 0.0)
    if beta is not None:
        bias = tl.load(beta + channel_offs, channel_valid, 0.0)
    offset = bias.to(tl.float64) - mean.to(tl.float64) * scale.to(tl.float64)
    pointers = bn_coeffs + channel_offs
    tl.store(pointers, scale, channel_valid)
    tl.store(pointers + channels, bias, channel_valid)
    tl.store(pointers + 2 * channels, offset.to(tl.float32), channel_valid)


@triton.jit
def store_dy_coeffs(
    sum_dz,  # (BLOCK,) float32, values; so are the next one and invstd
    sum_dz_xhat,
    mean,  # (channels,)
    invstd,
    bn_coeffs,  # (3, channels)
    dy_coeffs,  # (3, channels)
    channel_offs,  # (BLOCK,)
    pixels,
    channels,
):
    """types.make_dy_coeffs."""
    channel_valid = channel_offs < channels
    factor = tl.load(bn_coeffs + channel_offs, channel_valid, 0.0).to(tl.float64) / pixels
    center = tl.load(mean + channel_offs, channel_valid, 0.0).to(tl.float64)
    slope = (factor * invstd.to(tl.float64) * sum_dz_xhat.to(tl.float64)).to(tl.float32)
    level = factor * sum_dz.to(tl.float64)
    offset = level - center * slope.to(tl.float64)
    pointers = dy_coeffs + channel_offs
    tl.store(pointers, slope, channel_valid)
    tl.store(pointers + channels, level.to(tl.float32), channel_valid)
    tl.store(pointers + 2 * channels, offset.to(tl.float32), channel_valid)


@triton.jit
def bn_coeffs_kernel(
    mean,  # (channels,)
    invstd,  # (channels,)
    gamma,  # (channels,) or None
    beta,  # (channels,) or None
    bn_coeffs,  # (3, channels) float32
    channels,
    BLOCK: tl.constexpr,
):
    channel_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel_valid = channel_offs < channels
    center = tl.load(mean + channel_offs, channel_valid, 0.0)
    invstd_value = tl.load(invstd + channel_offs, channel_valid, 0.0)
    store_bn_coeffs(center, invstd_value, gamma, beta, bn_coeffs, channel_offs, channels)


def bn_coeffs_of(mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """types.make_bn_coeffs in one launch, for statistics that reductions.norm_statistics has not computed."""
    bn_coeffs = mean.new_empty(3, len(mean))
    _launch_per_channel(
        bn_coeffs_kernel,
        {
            "mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta, "bn_coeffs": bn_coeffs,
            "channels": len(mean),
        },
    )  # fmt: skip
    return bn_coeffs


def with_bn_coeffs(a: Activation) -> Activation:
    """``a`` with its bn_coeffs computed, where it has statistics."""
    if a.mean is None or a.invstd is None or a.bn_coeffs is not None:
        return a
    return a._replace(bn_coeffs=bn_coeffs_of(a.mean, a.invstd, a.weight, a.bias))


@triton.jit
def dy_coeffs_kernel(
    sum_dz,  # (channels,)
    sum_dz_xhat,  # (channels,)
    mean,  # (channels,)
    invstd,  # (channels,)
    bn_coeffs,  # (3, channels)
    dy_coeffs,  # (3, channels) float32
    channels,
    pixels,
    BLOCK: tl.constexpr,
):
    channel_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel_valid = channel_offs < channels
    total = tl.load(sum_dz + channel_offs, channel_valid, 0.0)
    total_xhat = tl.load(sum_dz_xhat + channel_offs, channel_valid, 0.0)
    invstd_value = tl.load(invstd + channel_offs, channel_valid, 0.0)
    store_dy_coeffs(
        total, total_xhat, mean, invstd_value, bn_coeffs, dy_coeffs, channel_offs, pixels, channels
    )


def dy_coeffs_of(
    sum_dz: Tensor, sum_dz_xhat: Tensor, mean: Tensor, invstd: Tensor, bn_coeffs: Tensor, pixels: int
) -> Tensor:
    """types.make_dy_coeffs in one launch, for sums that reductions.sum_tiles has not computed."""
    dy_coeffs = torch.empty_like(bn_coeffs)
    _launch_per_channel(
        dy_coeffs_kernel,
        {
            "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat, "mean": mean, "invstd": invstd, "bn_coeffs": bn_coeffs,
            "dy_coeffs": dy_coeffs, "channels": len(mean), "pixels": pixels,
        },
    )  # fmt: skip
    return dy_coeffs


def with_dy_coeffs(dy: Gradient) -> Gradient:
    """``dy`` with its bn_coeffs and dy_coeffs computed, where it has statistics and sums."""
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
def rectified_mean_kernel(
    weight,  # (channels,) float32
    bias,  # (channels,) float32
    mean,  # (channels,) float32
    channels,
    BLOCK: tl.constexpr,
):
    channel_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel_valid = channel_offs < channels
    std = tl.abs(tl.load(weight + channel_offs, channel_valid, 0.0))
    center = tl.load(bias + channel_offs, channel_valid, 0.0)
    # Clamped, so that nothing overflows: at the bounds both terms have reached their limits.
    ratio = tl.minimum(tl.maximum(center / tl.maximum(std, 1e-30), -30.0), 30.0)
    density = tl.exp(-0.5 * ratio * ratio) * 0.3989422804014327  # 1 / sqrt(2 pi)
    probability = 0.5 * (1.0 + tl.erf(ratio * 0.7071067811865476))  # 1 / sqrt(2)
    value = center * probability + std * density
    tl.store(mean + channel_offs, tl.where(tl.abs(value) < float("inf"), value, 0.0), channel_valid)


def rectified_mean(weight: Tensor, bias: Tensor) -> Tensor:
    """The mean of relu(bn(y)) if y is normally distributed: the shift that centers it, before y is known.

    Zero where it is infinite or NaN.

    Args:
        weight, bias: of the batch norm, (C,), float32.
    """
    mean = torch.empty_like(weight)
    _launch_per_channel(
        rectified_mean_kernel, {"weight": weight, "bias": bias, "mean": mean, "channels": len(weight)}
    )
    return mean
