"""The fused ops as functions, with the arguments of torch.nn.functional.batch_norm.

Every function takes activations of shape (N, C, H, W) in float32, float64, bfloat16 or float16, contiguous or
channels_last, and returns its result in the same dtype and layout. Vectors have one element per channel. In training
the statistics are the batch's and the running ones are updated in place, by
``running = (1 - momentum) * running + momentum * batch`` with the unbiased variance; otherwise the running
statistics normalize. Gradients flow to the activations, weights and biases, to any order.

Under transforms that fused ops do not support (torch.func, forward-mode AD, torch.export, torch.jit.trace), and on
empty activations, they run as plain PyTorch.

Errors of all of them, which are those of torch.nn.functional.batch_norm where it has them:

- TypeError: an activation is not a tensor of one of the four dtypes.
- ValueError: wrong rank or shape; a batch with one value per channel in training; eps negative, or 0 in training;
  tensors on different devices.
- RuntimeError: a vector without one element per channel; no running statistics in evaluation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import ops
from resnet_fused.ops.bn_stats import check_bn
from resnet_fused.ops.transforms import why_not_here
from resnet_fused.types import BatchNorm

__all__ = ["BatchNorm", "bn_add_relu", "bn_bn_add_relu", "bn_relu", "bn_relu_maxpool"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bn_relu(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(y)). The memory held for backward is ``y`` alone."""
    bn = BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps)
    _check(y, bn)
    return F.relu(_batch_norm(y, bn)) if _runs_plain(y, bn) else ops.bn_relu(y, bn)


def bn_add_relu(
    y: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(y) + residual). Held for backward: ``y`` and one bit per element."""
    bn = BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps)
    _check(y, bn)
    residual = _partner(residual, y, "residual")
    if _runs_plain(y, bn):
        return F.relu(_batch_norm(y, bn) + residual)
    return ops.bn_add_relu(y, residual, bn)


def bn_bn_add_relu(y: Tensor, skip: Tensor, bn: BatchNorm, skip_bn: BatchNorm) -> Tensor:
    """relu(batch_norm(y) + batch_norm(skip)), each with a ``BatchNorm``: running_mean, running_var, weight, bias,
    training, momentum, eps. Held for backward: ``y``, ``skip`` and one bit per element.
    """
    _check(y, bn)
    skip = _partner(skip, y, "skip")
    _check(skip, skip_bn)
    if _runs_plain(y, bn, skip_bn):
        return F.relu(_batch_norm(y, bn) + _batch_norm(skip, skip_bn))
    return ops.bn_bn_add_relu(y, skip, bn, skip_bn)


def bn_relu_maxpool(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """max_pool2d(relu(batch_norm(y)), 3, stride=2, padding=1). Held for backward: ``y`` and one byte per result."""
    bn = BatchNorm(running_mean, running_var, weight, bias, training, momentum, eps)
    _check(y, bn)
    if _runs_plain(y, bn):
        return F.max_pool2d(F.relu(_batch_norm(y, bn)), 3, 2, 1)
    return ops.bn_relu_maxpool(y, bn)


def _runs_plain(y: Tensor, *bns: BatchNorm) -> bool:
    # What F.batch_norm makes of such an eps depends on the version of torch.
    return y.numel() == 0 or why_not_here() is not None or any(bn.eps <= 0 for bn in bns)


def _batch_norm(y: Tensor, bn: BatchNorm) -> Tensor:
    mean, var, weight, bias, training, momentum, eps, *_ = bn
    return F.batch_norm(y, mean, var, weight, bias, training, momentum, eps)


def _check(y: Tensor, bn: BatchNorm) -> None:
    if not isinstance(y, Tensor) or y.dtype not in _DTYPES:
        given = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"expected a float32, float64, bfloat16 or float16 tensor, got {given}")
    if y.dim() != 4:
        raise ValueError(f"expected 4D input (got {y.dim()}D input)")
    if bn.training and len(y) * y.shape[2] * y.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
    for name, value in zip(BatchNorm._fields[:4], bn, strict=False):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if y.numel() > 0:  # else F.batch_norm refuses less
        check_bn(bn, y.shape[1])
    for name in ("running_mean", "running_var", "weight", "bias"):
        vector = getattr(bn, name)
        if vector is not None and vector.device != y.device:
            raise ValueError(
                f"{name} is on {vector.device} but the activation on {y.device}: move one of them"
            )


def _partner(other: Tensor, y: Tensor, name: str) -> Tensor:
    """The second activation, fit to be added to the first."""
    if not isinstance(other, Tensor) or other.dtype != y.dtype:
        given = other.dtype if isinstance(other, Tensor) else type(other).__name__
        raise TypeError(f"{name} must have the activation's dtype {y.dtype}, got {given}")
    if other.shape != y.shape:
        raise ValueError(
            f"{name} must have the activation's shape {tuple(y.shape)}, got {tuple(other.shape)}"
        )
    if other.device != y.device:
        raise ValueError(f"{name} is on {other.device} but the activation on {y.device}: move one of them")
    return other
