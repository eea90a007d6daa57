"""relu(bn(y) + residual): the last ops of a block whose shortcut is its input.

Backward needs neither the residual nor the output: one mask bit per element says what the ReLU let through.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import dense, mask_shape, unpack_mask
from resnet_fused.ops._autograd import (
    bias_gradient,
    differentiable_backward,
    needs_plain_backward,
    normalized,
    save,
    saved,
)
from resnet_fused.ops.bn_stats import BnMode, in_statistics_dtype, parameter_gradients, stats_for
from resnet_fused.ops.registry import register_op
from resnet_fused.reference import bn_add_relu as reference
from resnet_fused.types import BatchNorm, BatchStats


def fake_out_and_mask(y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = dense(y)
    return torch.empty_like(y), y.new_empty(mask_shape(y), dtype=torch.uint8)


def _fake_sums(grad: Tensor, mask: Tensor, y: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def fake_gradients(grad: Tensor, mask: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = dense(y)
    return torch.empty_like(y), torch.empty_like(y)


bn_add_relu_forward = register_op(
    "bn_add_relu(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor residual)"
    " -> (Tensor out, Tensor mask)",
    reference.bn_add_relu,
    fake_out_and_mask,
)
bn_add_relu_out = register_op(
    "bn_add_relu_out(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor residual,"
    " Tensor(a!) out, Tensor(b!) mask) -> ()",
    reference.bn_add_relu_out,
    lambda *_: None,
)
bn_add_relu_backward_reduce = register_op(
    "bn_add_relu_backward_reduce(Tensor grad, Tensor mask, Tensor y, Tensor mean, Tensor invstd)"
    " -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    reference.bn_add_relu_backward_reduce,
    _fake_sums,
)
bn_add_relu_backward = register_op(
    "bn_add_relu_backward(Tensor grad, Tensor mask, Tensor y, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat) -> (Tensor dy, Tensor dresidual)",
    reference.bn_add_relu_backward,
    fake_gradients,
)
bn_add_relu_backward_dy = register_op(
    "bn_add_relu_backward_dy(Tensor grad, Tensor mask, Tensor y, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat) -> Tensor",
    reference.bn_add_relu_backward_dy,
    lambda grad, mask, y, *_: torch.empty_like(dense(y)),
)


class _BnAddRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: BatchStats,
        mode: BnMode,
    ) -> Tensor:
        out: Tensor
        out, mask = bn_add_relu_forward(y, stats.mean, stats.invstd, weight, bias, residual)
        ctx.mode = mode
        save(ctx, [y], [mask, weight, *stats[:3]])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), (mask, weight, *stats) = saved(ctx)
        mean, invstd, count_fraction = stats
        needs_y, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        if needs_plain_backward(grad):
            dz = torch.where(unpack_mask(mask, y), grad, 0.0)

            def again(y: Tensor, weight: Tensor | None) -> Tensor:
                return normalized(y, weight, None, BatchStats(*stats), ctx.mode).to(y.dtype)

            dy, dweight = differentiable_backward(again, (y, weight), (needs_y, needs_weight), dz)
            dbias = bias_gradient(dz) if needs_bias else None
            return dy, dz if needs_residual else None, dweight, dbias, None, None
        reduce = functools.partial(bn_add_relu_backward_reduce, grad, mask, y, mean, invstd)
        needs = needs_weight, needs_bias
        dweight, dbias, sums = parameter_gradients(reduce, needs, ctx.mode, count_fraction)
        dy, dresidual = bn_add_relu_backward(grad, mask, y, mean, invstd, weight, *sums)
        return dy, dresidual, dweight, dbias, None, None


def bn_add_relu(y: Tensor, residual: Tensor, bn: BatchNorm) -> Tensor:
    """relu(batch_norm(y) + residual) of activations (N, C, H, W), in their dtype and y's layout."""
    stats = stats_for(y, bn)
    weight, bias = in_statistics_dtype(bn.weight, y), in_statistics_dtype(bn.bias, y)
    out: Tensor = _BnAddRelu.apply(y, residual, weight, bias, stats, BnMode.of(bn))
    return out
