"""relu(bn(y) + bn(skip)), the last ops of a block whose shortcut has a convolution and a batch norm of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import check_given, dense, like_layout, pack_mask, stored, widened
from resnet_fused.reference.batch_norm import affine, gradient_sums, input_gradient, relu_mask
from resnet_fused.reference.bn_add_relu import relu_backward


def bn_bn_add_relu(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    skip: Tensor,
    skip_mean: Tensor,
    skip_invstd: Tensor,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """relu(z + skip_z), each the batch norm (a - mean) * (invstd * weight) + bias of its activation a.

    Args:
        y, skip: activations of one shape (N, C, H, W) and dtype.
        all others: (C,), statistics dtype.

    Returns:
        out: shape, dtype and layout of ``y`` (of dense(y) where y is not dense).
        mask: uint8, see layout.pack_mask.
    """
    y = dense(y)
    z = affine(widened(y), mean, invstd, weight, bias)
    z = z + affine(widened(like_layout(skip, y)), skip_mean, skip_invstd, skip_weight, skip_bias)
    return stored(torch.relu(z), y), pack_mask(relu_mask(z), y)


def bn_bn_add_relu_out(y: Tensor, *rest: Any) -> None:
    """bn_bn_add_relu into ``out`` and ``mask``, the last arguments: slices of larger tensors along N say.

    Raises:
        ValueError: ``out`` does not have the shape, dtype and layout of dense(y).
    """
    *operands, out, mask = rest
    check_given(out, dense(y))
    for given, result in zip((out, mask), bn_bn_add_relu(y, *operands), strict=True):
        given.copy_(result)


def bn_bn_add_relu_backward_reduce(
    grad: Tensor,
    mask: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    skip: Tensor,
    skip_mean: Tensor,
    skip_invstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_dz, sum_dz_xhat, sum_dz_skip_xhat), (C,) in the statistics dtype; both norms share sum_dz."""
    y = dense(y)
    dz = relu_backward(grad, mask, y)
    wide_skip = widened(like_layout(skip, y))
    sum_dz, sum_dz_skip_xhat = gradient_sums(dz, wide_skip, skip_mean, skip_invstd)
    _, sum_dz_xhat = gradient_sums(dz, widened(y), mean, invstd)
    return sum_dz, sum_dz_xhat, sum_dz_skip_xhat


def bn_bn_add_relu_backward(
    grad: Tensor,
    mask: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    skip: Tensor,
    skip_mean: Tensor,
    skip_invstd: Tensor,
    skip_weight: Tensor | None,
    skip_sum_dz: Tensor | None,
    sum_dz_skip_xhat: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dy, dskip), each with shape, dtype and layout of ``y``.

    The sums of either batch norm are None where its statistics are constants.

    Raises:
        ValueError: only one of the two sums of a batch norm is None.
    """
    y = dense(y)
    dz = relu_backward(grad, mask, y)
    dy = input_gradient(dz, widened(y), mean, invstd, weight, sum_dz, sum_dz_xhat)
    wide_skip = widened(like_layout(skip, y))
    dskip = input_gradient(dz, wide_skip, skip_mean, skip_invstd, skip_weight, skip_sum_dz, sum_dz_skip_xhat)
    return stored(dy, y), stored(dskip, y)
