"""relu(bn(y)): one pass forward; one reduction and one pass backward, which finds the ReLU's mask again in ``y``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.layout import dense
from resnet_fused.ops._autograd import differentiable_backward, needs_plain_backward, normalized, save, saved
from resnet_fused.ops.bn_stats import (
    BnMode,
    bias_for_backward,
    in_statistics_dtype,
    parameter_gradients,
    stats_for,
)
from resnet_fused.ops.registry import register_op
from resnet_fused.reference import bn_relu as reference
from resnet_fused.types import BatchNorm, BatchStats


def _like_y(y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(dense(y))


def _fake_sums(grad: Tensor, y: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


bn_relu_forward = register_op(
    "bn_relu(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? shift=None) -> Tensor",
    reference.bn_relu,
    _like_y,
)
bn_relu_backward_reduce = register_op(
    "bn_relu_backward_reduce(Tensor grad, Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias)"
    " -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    reference.bn_relu_backward_reduce,
    _fake_sums,
)
bn_relu_backward = register_op(
    "bn_relu_backward(Tensor grad, Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat) -> Tensor",
    reference.bn_relu_backward,
    lambda grad, y, *_: _like_y(y),
)


class _BnRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, stats: BatchStats, mode: BnMode
    ) -> Tensor:
        ctx.mode = mode
        save(ctx, [y], [weight, bias, *stats[:3]])
        out: Tensor = bn_relu_forward(y, stats.mean, stats.invstd, weight, bias, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), (weight, bias, *stats) = saved(ctx)
        mean, invstd, count_fraction = stats
        needs_grad = ctx.needs_input_grad[:3]
        if needs_plain_backward(grad):

            def again(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return F.relu(normalized(y, weight, bias, BatchStats(*stats), ctx.mode).to(y.dtype))

            grads = differentiable_backward(again, (y, weight, bias), needs_grad, grad)
            return *grads, None, None
        reduce = functools.partial(bn_relu_backward_reduce, grad, y, mean, invstd, weight, bias)
        dweight, dbias, sums = parameter_gradients(reduce, needs_grad[1:], ctx.mode, count_fraction)
        dy = bn_relu_backward(grad, y, mean, invstd, weight, bias, *sums) if needs_grad[0] else None
        return dy, dweight, dbias, None, None


def bn_relu(y: Tensor, bn: BatchNorm) -> Tensor:
    """relu(batch_norm(y)) of an activation (N, C, H, W), in its dtype and layout."""
    stats = stats_for(y, bn)
    weight, bias = in_statistics_dtype(bn.weight, y), bias_for_backward(bn.bias, y)
    out: Tensor = _BnRelu.apply(y, weight, bias, stats, BnMode.of(bn))
    return out
