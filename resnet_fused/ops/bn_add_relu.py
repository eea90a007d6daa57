"""relu(bn(y) + residual): the end of a block whose input goes through unchanged.

Backward needs neither the residual nor the output: one mask bit per element says what the ReLU let through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.ops._autograd import (
    bias_gradient,
    differentiable_backward,
    needs_plain_backward,
    normalized,
    save,
    saved,
)
from resnet_fused.ops._primitive import primitive
from resnet_fused.ops.batch_norm_stats import Norm, in_statistics_dtype, shared_sums, statistics
from resnet_fused.reference import bn_add_relu as reference
from resnet_fused.reference.layout import dense, mask_shape, unpack_mask


def _out_and_mask(y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = dense(y)
    return torch.empty_like(y), y.new_empty(mask_shape(y), dtype=torch.uint8)


def _two_sums(grad: Tensor, mask: Tensor, y: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _two_gradients(grad: Tensor, mask: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = dense(y)
    return torch.empty_like(y), torch.empty_like(y)


forward_pass = primitive(
    "bn_add_relu(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor residual)"
    " -> (Tensor out, Tensor mask)",
    reference.bn_add_relu,
    _out_and_mask,
)
forward_pass_into = primitive(
    "bn_add_relu_out(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor residual,"
    " Tensor(a!) out, Tensor(b!) mask) -> ()",
    reference.bn_add_relu_out,
    lambda *_: None,
)
backward_reduce = primitive(
    "bn_add_relu_backward_reduce(Tensor grad, Tensor mask, Tensor y, Tensor mean, Tensor invstd)"
    " -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    reference.bn_add_relu_backward_reduce,
    _two_sums,
)
backward_pass = primitive(
    "bn_add_relu_backward(Tensor grad, Tensor mask, Tensor y, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat) -> (Tensor dy, Tensor dresidual)",
    reference.bn_add_relu_backward,
    _two_gradients,
)
backward_dy = primitive(
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
        mean: Tensor,
        invstd: Tensor,
        share: Tensor | None,
        training: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        out: Tensor
        out, mask = forward_pass(y, mean, invstd, weight, bias, residual)
        ctx.training, ctx.group = training, group
        save(ctx, [y], [mask, weight, mean, invstd, share])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), (mask, weight, mean, invstd, share) = saved(ctx)
        needs_y, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        if needs_plain_backward(grad):
            dz = torch.where(unpack_mask(mask, y), grad, 0.0)

            def again(y: Tensor, weight: Tensor | None) -> Tensor:
                return normalized(y, weight, None, mean, invstd, ctx.training).to(y.dtype)

            dy, dweight = differentiable_backward(again, (y, weight), (needs_y, needs_weight), dz, ctx.group)
            dbias = bias_gradient(dz) if needs_bias else None
            return dy, dz if needs_residual else None, dweight, dbias, *[None] * 5
        dbias = dweight = None
        sums: list[Tensor | None] = [None, None]
        if ctx.training or needs_weight or needs_bias:
            dbias, dweight = backward_reduce(grad, mask, y, mean, invstd)
            if ctx.training:
                sums = [*shared_sums((dbias, dweight), ctx.group, share)]
        dy, dresidual = backward_pass(grad, mask, y, mean, invstd, weight, *sums)
        return dy, dresidual, dweight if needs_weight else None, dbias if needs_bias else None, *[None] * 5


def bn_add_relu(y: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """relu(batch_norm(y) + residual) of activations (N, C, H, W), in their dtype and y's layout."""
    mean, invstd, share, _ = statistics(y, norm)
    weight, bias = in_statistics_dtype(norm.weight, y), in_statistics_dtype(norm.bias, y)
    out: Tensor = _BnAddRelu.apply(y, residual, weight, bias, mean, invstd, share, norm.training, norm.group)
    return out
