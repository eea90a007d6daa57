"""relu(bn(y)), and its backward, which finds the ReLU's sign again from y."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.layout import dense, like_layout, per_channel, stored, widened
from resnet_fused.reference.batch_norm import affine, gradient_sums, input_gradient, relu_mask


def bn_relu(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None = None,
) -> Tensor:
    """relu((y - mean) * (invstd * weight) + bias) - shift, rounded once.

    Args:
        y: activation (N, C, H, W).
        mean, invstd, weight, bias, shift: (C,), statistics dtype; shift None is zeros.

    Returns:
        Shape, dtype and layout of ``y`` (of dense(y) where y is not dense).
    """
    y = dense(y)
    out = torch.relu(affine(widened(y), mean, invstd, weight, bias))
    return stored(out if shift is None else out - per_channel(shift, y), y)


def bn_relu_backward_reduce(
    grad: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(sum_dz, sum_dz_xhat), (C,) in the statistics dtype; ``grad`` is that of bn_relu's output."""
    y = dense(y)
    wide = widened(y)
    dz = _masked_dz(grad, y, wide, mean, invstd, weight, bias)
    return gradient_sums(dz, wide, mean, invstd)


def bn_relu_backward(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
) -> Tensor:
    """dy, with shape, dtype and layout of ``y``; both sums None where the statistics are constants.

    Raises:
        ValueError: only one of the sums is None.
    """
    y = dense(y)
    wide = widened(y)
    dz = _masked_dz(grad, y, wide, mean, invstd, weight, bias)
    return stored(input_gradient(dz, wide, mean, invstd, weight, sum_dz, sum_dz_xhat), y)


def _masked_dz(
    grad: Tensor,
    y: Tensor,
    wide: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    mask = relu_mask(affine(wide, mean, invstd, weight, bias))
    return torch.where(mask, widened(like_layout(grad, y)), 0)
