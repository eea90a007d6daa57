"""relu(bn(y)): one pass forward; one reduction and one pass backward, which finds the ReLU's mask again in ``y``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops._autograd import differentiable_backward, needs_plain_backward, normalized, save, saved
from resnet_fused.ops._primitive import primitive
from resnet_fused.ops.batch_norm_stats import (
    Norm,
    bias_for_backward,
    in_statistics_dtype,
    shared_sums,
    statistics,
)
from resnet_fused.reference import bn_relu as reference
from resnet_fused.reference.layout import dense


def _like_y(y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(dense(y))


def _two_sums(grad: Tensor, y: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


forward_pass = primitive(
    "bn_relu(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? shift=None) -> Tensor",
    reference.bn_relu,
    _like_y,
)
backward_reduce = primitive(
    "bn_relu_backward_reduce(Tensor grad, Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias)"
    " -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    reference.bn_relu_backward_reduce,
    _two_sums,
)
backward_pass = primitive(
    "bn_relu_backward(Tensor grad, Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat) -> Tensor",
    reference.bn_relu_backward,
    lambda grad, y, *_: _like_y(y),
)


class _BnRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        share: Tensor | None,
        training: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.training, ctx.group = training, group
        save(ctx, [y], [weight, bias, mean, invstd, share])
        out: Tensor = forward_pass(y, mean, invstd, weight, bias, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), (weight, bias, mean, invstd, share) = saved(ctx)
        needs_grad = ctx.needs_input_grad[:3]
        if needs_plain_backward(grad):

            def again(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return F.relu(normalized(y, weight, bias, mean, invstd, ctx.training).to(y.dtype))

            grads = differentiable_backward(again, (y, weight, bias), needs_grad, grad, ctx.group)
            return *grads, *[None] * 5
        dbias = dweight = None
        sums: list[Tensor | None] = [None, None]
        if ctx.training or any(needs_grad[1:]):
            dbias, dweight = backward_reduce(grad, y, mean, invstd, weight, bias)
            if ctx.training:
                sums = [*shared_sums((dbias, dweight), ctx.group, share)]
        dy = backward_pass(grad, y, mean, invstd, weight, bias, *sums) if needs_grad[0] else None
        return dy, dweight if needs_grad[1] else None, dbias if needs_grad[2] else None, *[None] * 5


def bn_relu(y: Tensor, norm: Norm) -> Tensor:
    """relu(batch_norm(y)) of an activation (N, C, H, W), in its dtype and layout."""
    mean, invstd, share, _ = statistics(y, norm)
    weight, bias = in_statistics_dtype(norm.weight, y), bias_for_backward(norm.bias, y)
    out: Tensor = _BnRelu.apply(y, weight, bias, mean, invstd, share, norm.training, norm.group)
    return out
