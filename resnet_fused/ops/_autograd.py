"""What the autograd.Functions of the ops share: autocast, saved tensors, and gradients through plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.layout import dense, memory_format, per_channel, statistics_dtype, widened
from resnet_fused.ops.bn_stats import BnMode
from resnet_fused.ops.transforms import transforms_are_active
from resnet_fused.reference.batch_norm import affine
from resnet_fused.types import BatchStats


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast makes of activations on a device type; None where it is off, or there is none (meta)."""
    # Not asked of torch: dynamo of 2.11 stops at torch.amp.is_autocast_available.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which matmuls of float32 stay in float32."""
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def save(ctx: Any, activations: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> None:
    """Saves tensors for backward: activations, all in the first one's layout, and other tensors."""
    assert activations[0] is not None
    ctx.layout = memory_format(dense(activations[0]))
    ctx.given = tuple(t is not None for t in activations), tuple(t is not None for t in others)
    # Tools that walk the graph expect no None among the saved tensors.
    ctx.save_for_backward(*(t for t in (*activations, *others) if t is not None))


def saved(ctx: Any) -> tuple[list[Any], list[Any]]:
    """What ``save`` saved, with the layouts that kernels expect: hooks for saved tensors may change strides."""
    values = iter(ctx.saved_tensors)
    activations = [next(values).contiguous(memory_format=ctx.layout) if g else None for g in ctx.given[0]]
    others = [next(values) if given else None for given in ctx.given[1]]
    # Not the weights: convolutions take any strides, and gradients have those of the parameters.
    return activations, [t if t is None or t.dim() == 4 else t.contiguous() for t in others]


def remember(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Holds inputs that only double backward needs, outside saved_tensors: an in-place change fails only that."""
    if any(ctx.needs_input_grad) and not torch.compiler.is_compiling():
        ctx.remembered = [(t, _version(t)) for t in tensors]


def _version(t: Tensor | None) -> int | None:
    """How often a tensor was changed in place; PyTorch doesn't count it for those made in inference mode."""
    return None if t is None or t.is_inference() else t._version


def remembered(ctx: Any) -> list[Tensor | None]:
    """The tensors given to ``remember``.

    Raises:
        RuntimeError: one was changed in place since.
    """
    for t, version in ctx.remembered:
        if t is not None and _version(t) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"batch norm's bias, of shape {tuple(t.shape)}; to differentiate gradients it must stay as it was"
            )
    return [t for t, _ in ctx.remembered]


def needs_plain_backward(grad: Tensor) -> bool:
    """Whether gradients are to be made by ops that can be differentiated again, or batched (is_grads_batched)."""
    return torch.is_grad_enabled() or _may_be_batched(grad)


def _may_be_batched(grad: Tensor) -> bool:
    if transforms_are_active():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


class _SumOverProcesses(torch.autograd.Function):
    """A sum over all processes of a group, whose losses add up: derivatives are such sums too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_over_processes(grad, ctx.group), None


def _sum_over_processes(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if _may_be_batched(x):
        raise RuntimeError(
            "batched gradients are not supported with statistics shared across processes (SyncBatchNorm)"
        )
    total: Tensor = _SumOverProcesses.apply(x, group)
    return total


def normalized(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, stats: BatchStats, mode: BnMode
) -> Tensor:
    """Batch norm of ``y`` as a differentiable function of y, weight and bias, in the statistics dtype.

    In training the statistics are functions of ``y`` too, over all processes that share them. ``var + eps`` takes its
    value from ``stats`` and its derivative from ``y``, so that eps need not be known.

    Raises:
        RuntimeError: gradients are batched, and statistics shared across processes.
    """
    values, (mean, invstd, count_fraction, *_) = widened(y), stats

    def batch_mean(x: Tensor) -> Tensor:
        of_this_process = x.mean((0, 2, 3))
        if mode.group is None or count_fraction is None:
            return of_this_process
        return _sum_over_processes(of_this_process * count_fraction, mode.group)

    if mode.training:
        mean = batch_mean(values)
        var = batch_mean((values - per_channel(mean, values)).square())
        invstd = (var - var.detach() + invstd.pow(-2)).rsqrt()
    return affine(values, mean, invstd, weight, bias)


def bias_gradient(dz: Tensor) -> Tensor:
    """The gradient of a batch norm's bias, (C,), in the statistics dtype; differentiable."""
    return dz.sum((0, 2, 3), dtype=statistics_dtype(dz.dtype))


def differentiable_backward(
    forward: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of ``forward(*inputs)`` by plain PyTorch; None where none is needed.

    They can be differentiated again where grad mode is on.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each, so that one tensor given twice still gets two gradients.
        views = [None if x is None else x.view_as(x) for x in inputs]
        out = forward(*views)
        wanted = [view for view, needed in zip(views, needs_grad, strict=True) if needed and view is not None]
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return [
        next(grads) if needed and x is not None else None
        for x, needed in zip(inputs, needs_grad, strict=True)
    ]
