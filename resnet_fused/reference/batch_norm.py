"""Batch norm as arithmetic on given statistics, forward and backward; what all the fused ops share.

Everything here takes and returns activations in the statistics dtype; the ops round once, at the store.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.layout import per_channel

_PIXELS = (0, 2, 3)


def affine(y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """z = (y - mean) * (invstd * weight) + bias; weight None is ones, bias None is zeros.

    Centred before it is scaled: y*scale + shift cancels two large numbers where |mean| >> std.
    """
    z = (y - per_channel(mean, y)) * per_channel(scale(invstd, weight), y)
    return z if bias is None else z + per_channel(bias, y)


def scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    """invstd * weight, (C,)."""
    return invstd if weight is None else invstd * weight


def relu_mask(z: Tensor) -> Tensor:
    """Where a ReLU lets ``z`` and its gradient through: bool. NaN passes, as it does in torch.relu."""
    return (z <= 0).logical_not()


def gradient_sums(dz: Tensor, y: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the pixels of each channel of dz and of dz * xhat, xhat = (y - mean) * invstd: dbias and dweight."""
    # n terms of either sign add up to about sqrt(n) of them: accumulated in float32, rounding would show.
    sum_dz = dz.sum(_PIXELS, dtype=torch.float64)
    sum_dz_centred = (dz * (y - per_channel(mean, y))).sum(_PIXELS, dtype=torch.float64)
    return sum_dz.to(dz.dtype), (sum_dz_centred * invstd).to(dz.dtype)


def input_gradient(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
) -> Tensor:
    """dy for the gradient dz of z = affine(y, ...).

    dy = invstd * weight * (dz - sum_dz / P - xhat * sum_dz_xhat / P), P the pixels of ``y``, where the
    statistics are those of ``y``; invstd * weight * dz where they are constants, which both sums None says.

    Raises:
        ValueError: one of the sums is given and the other is None.
    """
    if (sum_dz is None) != (sum_dz_xhat is None):
        raise ValueError("sum_dz and sum_dz_xhat must be given together, or both be None")
    if sum_dz is not None and sum_dz_xhat is not None and y.numel() > 0:
        pixels = y.numel() // y.shape[1]
        # Where a gradient lies almost along xhat it cancels: as few roundings as can be, so xhat is not formed.
        slope = (sum_dz_xhat.double() * invstd / pixels).to(y.dtype)
        along_xhat = (y - per_channel(mean, y)) * per_channel(slope, y)
        dz = dz - per_channel(sum_dz / pixels, y) - along_xhat
    return dz * per_channel(scale(invstd, weight), y)
