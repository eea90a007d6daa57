"""What the autograd.Functions of the ops share: autocast, and gradients of gradients through plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.reference.batch_norm import affine
from resnet_fused.reference.layout import widened


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast makes of activations on a device type; None where it is off, or there is none (meta)."""
    # Not asked of torch: dynamo of 2.11 stops at torch.amp.is_autocast_available.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which products of float32 vectors stay in float32."""
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def normalized(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, training: bool
) -> Tensor:
    """Batch norm of ``y`` as a differentiable function of y, weight and bias, in the statistics dtype.

    In training the statistics are functions of ``y`` too. ``var + eps`` takes its value from ``invstd`` and its
    derivative from ``y``, so that eps need not be known.
    """
    values = widened(y)
    if training:
        mean = values.mean((0, 2, 3))
        var = values.var((0, 2, 3), correction=0)
        invstd = (var - var.detach() + invstd.pow(-2)).rsqrt()
    return affine(values, mean, invstd, weight, bias)


def differentiable_backward(
    forward: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grad: Tensor,
    group: dist.ProcessGroup | None,
) -> list[Tensor | None]:
    """Gradients of ``forward(*inputs)`` that can themselves be differentiated; None where none is needed.

    Raises:
        RuntimeError: when the statistics were shared across processes.
    """
    if group is not None:
        raise RuntimeError(
            "double backward is not supported with statistics shared across processes (SyncBatchNorm)"
        )
    with torch.enable_grad():
        # A view of each, so that one tensor given twice still gets two gradients.
        views = [None if x is None else x.view_as(x) for x in inputs]
        out = forward(*views)
        wanted = [view for view, needed in zip(views, needs_grad, strict=True) if needed and view is not None]
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [
        next(grads) if needed and x is not None else None
        for x, needed in zip(inputs, needs_grad, strict=True)
    ]
