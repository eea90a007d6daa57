"""relu(bn(y) + residual), the last ops of a residual block, with the ReLU's mask as one bit per element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import (
    check_given,
    dense,
    like_layout,
    pack_mask,
    stored,
    unpack_mask,
    widened,
)
from resnet_fused.reference.batch_norm import affine, gradient_sums, input_gradient, relu_mask


def bn_add_relu(
    y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """relu((y - mean) * (invstd * weight) + bias + residual).

    Args:
        y, residual: activations of one shape (N, C, H, W) and dtype.
        mean, invstd, weight, bias: (C,), statistics dtype.

    Returns:
        out: shape, dtype and layout of ``y`` (of dense(y) where y is not dense).
        mask: uint8, see layout.pack_mask.
    """
    y = dense(y)
    z = affine(widened(y), mean, invstd, weight, bias) + widened(like_layout(residual, y))
    return stored(torch.relu(z), y), pack_mask(relu_mask(z), y)


def bn_add_relu_out(y: Tensor, *rest: Any) -> None:
    """bn_add_relu into ``out`` and ``mask``, the last arguments: slices of larger tensors along N say.

    Raises:
        ValueError: ``out`` does not have the shape, dtype and layout of dense(y).
    """
    *operands, out, mask = rest
    check_given(out, dense(y))
    for given, result in zip((out, mask), bn_add_relu(y, *operands), strict=True):
        given.copy_(result)


def bn_add_relu_backward_reduce(
    grad: Tensor, mask: Tensor, y: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum_dz, sum_dz_xhat), (C,) in the statistics dtype; ``grad`` is that of bn_add_relu's output."""
    y = dense(y)
    return gradient_sums(relu_backward(grad, mask, y), widened(y), mean, invstd)


def bn_add_relu_backward(
    grad: Tensor,
    mask: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dy, dresidual), each with shape, dtype and layout of ``y``.

    Both sums are None where the statistics are constants.

    Raises:
        ValueError: only one of the sums is None.
    """
    y = dense(y)
    dz = relu_backward(grad, mask, y)
    dy = input_gradient(dz, widened(y), mean, invstd, weight, sum_dz, sum_dz_xhat)
    return stored(dy, y), stored(dz, y)


def bn_add_relu_backward_dy(*args: Any) -> Tensor:
    """The dy of bn_add_relu_backward, whose arguments it has."""
    return bn_add_relu_backward(*args)[0]


def relu_backward(grad: Tensor, mask: Tensor, y: Tensor) -> Tensor:
    """``grad`` where the mask of the dense ``y`` has a bit, else 0, in the statistics dtype."""
    return torch.where(unpack_mask(mask, y), widened(like_layout(grad, y)), 0)
