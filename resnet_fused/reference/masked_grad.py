"""The gradient before a ReLU whose mask was saved, written or added to a given tensor, and its sums."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.layout import check_given, dense, stored, widened
from resnet_fused.reference.bn_add_relu import relu_backward


def masked_grad(grad: Tensor, mask: Tensor, out: Tensor, accumulate: bool, sum: Tensor | None) -> None:
    """out = dz, or out + dz; sum += dz summed over the pixels of each channel; dz = grad where the mask has a bit.

    Args:
        grad: (N, C, H, W), of the ReLU's output. What the ReLU held back may be infinite or NaN.
        mask: see layout.pack_mask, in the layout of ``out``.
        out: dense, shape and dtype of ``grad``, and none of its memory.
        accumulate: add to ``out``, with one rounding.
        sum: (C,), float64.

    Raises:
        ValueError: ``out`` is not dense, or has another shape or dtype than ``grad``.
    """
    if grad.shape != out.shape or grad.dtype != out.dtype:
        raise ValueError("out must have the shape and dtype of grad")
    check_given(out, dense(out))
    dz = relu_backward(grad, mask, out)
    out.copy_(stored(widened(out) + dz if accumulate else dz, out))
    if sum is not None:
        sum += dz.double().sum((0, 2, 3))
