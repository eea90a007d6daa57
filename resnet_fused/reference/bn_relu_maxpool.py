"""The stem: 3x3 max-pooling, stride 2, padding 1, of relu(bn(y)), with one-byte indices for backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.layout import dense, like_layout, memory_format, stored, widened
from resnet_fused.reference.batch_norm import affine, gradient_sums, input_gradient, relu_mask

#: The index of a window whose maximum is not above zero: its gradient ends at the ReLU.
NO_GRADIENT = 9


def pooled_size(size: int) -> int:
    """Height or width after the pooling: (size - 1) // 2 + 1, and 0 for 0."""
    return (size + 1) // 2


def bn_relu_maxpool(
    y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """max_pool2d(relu((y - mean) * (invstd * weight) + bias), 3, stride=2, padding=1).

    Args:
        y: activation (N, C, H, W).
        mean, invstd, weight, bias: (C,), statistics dtype.

    Returns:
        out: (N, C, (H-1)//2+1, (W-1)//2+1), dtype and layout of ``y`` (of dense(y) where y is not dense).
        indices: uint8, shape and layout of ``out``; kh*3 + kw of the window's first maximum of relu(z) before
            it is rounded, or NO_GRADIENT where that is not above zero. NaN is the maximum, and the last of
            several wins, as in max_pool2d.
    """
    y = dense(y)
    height, width = pooled_size(y.shape[2]), pooled_size(y.shape[3])
    shape = (*y.shape[:2], height, width)
    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=memory_format(y))
    indices = torch.empty(shape, dtype=torch.uint8, device=y.device, memory_format=memory_format(y))
    if out.numel() == 0:
        return out, indices

    activation = torch.relu(affine(widened(y), mean, invstd, weight, bias))
    largest, position = F.max_pool2d(activation, 3, stride=2, padding=1, return_indices=True)
    top = 2 * torch.arange(height, device=y.device).view(-1, 1) - 1  # Ho,1: the window's first row in y
    left = 2 * torch.arange(width, device=y.device) - 1  # Wo
    row, col = position // y.shape[3] - top, position % y.shape[3] - left
    indices.copy_(torch.where(relu_mask(largest), row * 3 + col, NO_GRADIENT))
    return out.copy_(largest), indices


def bn_relu_maxpool_backward_reduce(
    grad: Tensor, indices: Tensor, y: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum_dz, sum_dz_xhat), (C,) in the statistics dtype.

    Args:
        grad: gradient of the pooled output.
        indices: what the forward returned.
    """
    y = dense(y)
    return gradient_sums(_spread(grad, indices, y), widened(y), mean, invstd)


def bn_relu_maxpool_backward(
    grad: Tensor,
    indices: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
) -> Tensor:
    """dy, with shape, dtype and layout of ``y``; both sums None where the statistics are constants.

    Raises:
        ValueError: only one of the sums is None.
    """
    y = dense(y)
    dz = _spread(grad, indices, y)
    return stored(input_gradient(dz, widened(y), mean, invstd, weight, sum_dz, sum_dz_xhat), y)


def _spread(grad: Tensor, indices: Tensor, y: Tensor) -> Tensor:
    """dz (N, C, H, W): every pooled gradient at the pixel that its index names, in the statistics dtype."""
    n, c, h, w = y.shape
    height, width = pooled_size(h), pooled_size(w)
    grad, indices = widened(like_layout(grad, y)), like_layout(indices, y)
    # One tap of all windows at a time: no two windows share a pixel then, and the order of sums is fixed.
    padded = grad.new_zeros(n, c, 2 * height + 1, 2 * width + 1).to(memory_format=memory_format(y))
    for tap in range(9):
        row, col = divmod(tap, 3)
        pixels = padded[:, :, row : row + 2 * height : 2, col : col + 2 * width : 2]
        pixels += torch.where(indices == tap, grad, 0)
    return padded[:, :, 1 : h + 1, 1 : w + 1]
