"""maxpool3x3(relu(bn(y))), stride 2, padding 1: the stem after its conv, in one pass.

Backward needs the conv's output and one index byte for each pooled element; the normalized activation, four times
the size of the result, never exists.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.layout import dense, memory_format
from resnet_fused.ops._autograd import (
    differentiable_backward,
    needs_plain_backward,
    normalized,
    remember,
    remembered,
    save,
    saved,
)
from resnet_fused.ops.bn_stats import BnMode, in_statistics_dtype, parameter_gradients, stats_for
from resnet_fused.ops.registry import register_op
from resnet_fused.reference import bn_relu_maxpool as reference
from resnet_fused.types import BatchNorm, BatchStats


def _out_and_indices(y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = dense(y)
    sizes = (*y.shape[:2], *(reference.pooled_size(size) for size in y.shape[2:]))
    out = torch.empty(sizes, dtype=y.dtype, device=y.device, memory_format=memory_format(y))
    return out, torch.empty_like(out, dtype=torch.uint8)


def _fake_sums(
    grad: Tensor, indices: Tensor, y: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


bn_relu_maxpool_forward = register_op(
    "bn_relu_maxpool(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias)"
    " -> (Tensor out, Tensor indices)",
    reference.bn_relu_maxpool,
    _out_and_indices,
)
bn_relu_maxpool_backward_reduce = register_op(
    "bn_relu_maxpool_backward_reduce(Tensor grad, Tensor indices, Tensor y, Tensor mean, Tensor invstd)"
    " -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    reference.bn_relu_maxpool_backward_reduce,
    _fake_sums,
)
bn_relu_maxpool_backward = register_op(
    "bn_relu_maxpool_backward(Tensor grad, Tensor indices, Tensor y, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat) -> Tensor",
    reference.bn_relu_maxpool_backward,
    lambda grad, indices, y, *_: torch.empty_like(dense(y)),
)


class _BnReluMaxpool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, stats: BatchStats, mode: BnMode
    ) -> Tensor:
        out: Tensor
        out, indices = bn_relu_maxpool_forward(y, stats.mean, stats.invstd, weight, bias)
        ctx.mode = mode
        remember(ctx, [bias])
        save(ctx, [y, indices], [weight, *stats[:3]])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y, indices), (weight, *stats) = saved(ctx)
        mean, invstd, count_fraction = stats
        needs_grad = ctx.needs_input_grad[:3]
        if needs_plain_backward(grad):

            def again(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                z = normalized(y, weight, bias, BatchStats(*stats), ctx.mode)
                return F.max_pool2d(F.relu(z), 3, 2, 1).to(y.dtype)

            (bias,) = remembered(ctx)
            grads = differentiable_backward(again, (y, weight, bias), needs_grad, grad)
            return *grads, None, None
        reduce = functools.partial(bn_relu_maxpool_backward_reduce, grad, indices, y, mean, invstd)
        dweight, dbias, sums = parameter_gradients(reduce, needs_grad[1:], ctx.mode, count_fraction)
        dy = (
            bn_relu_maxpool_backward(grad, indices, y, mean, invstd, weight, *sums) if needs_grad[0] else None
        )
        return dy, dweight, dbias, None, None


def bn_relu_maxpool(y: Tensor, bn: BatchNorm) -> Tensor:
    """max_pool2d(relu(batch_norm(y)), 3, stride=2, padding=1) of an activation (N, C, H, W)."""
    stats = stats_for(y, bn)
    weight, bias = in_statistics_dtype(bn.weight, y), in_statistics_dtype(bn.bias, y)
    out: Tensor = _BnReluMaxpool.apply(y, weight, bias, stats, BnMode.of(bn))
    return out
