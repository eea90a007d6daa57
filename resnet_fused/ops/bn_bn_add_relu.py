"""relu(bn(y) + bn(skip)): the last ops of a block whose shortcut has a convolution and a batch norm of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import unpack_mask
from resnet_fused.ops._autograd import (
    bias_gradient,
    differentiable_backward,
    needs_plain_backward,
    normalized,
    save,
    saved,
)
from resnet_fused.ops.bn_add_relu import fake_gradients, fake_out_and_mask
from resnet_fused.ops.bn_stats import BnMode, in_statistics_dtype, shared_sums, stats_for
from resnet_fused.ops.registry import register_op
from resnet_fused.reference import bn_bn_add_relu as reference
from resnet_fused.types import BatchNorm, BatchStats


def _fake_sums(grad: Tensor, mask: Tensor, y: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)


bn_bn_add_relu_forward = register_op(
    "bn_bn_add_relu(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor skip, Tensor skip_mean, Tensor skip_invstd, Tensor? skip_weight, Tensor? skip_bias)"
    " -> (Tensor out, Tensor mask)",
    reference.bn_bn_add_relu,
    fake_out_and_mask,
)
bn_bn_add_relu_out = register_op(
    "bn_bn_add_relu_out(Tensor y, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor skip, Tensor skip_mean, Tensor skip_invstd, Tensor? skip_weight, Tensor? skip_bias,"
    " Tensor(a!) out, Tensor(b!) mask) -> ()",
    reference.bn_bn_add_relu_out,
    lambda *_: None,
)
bn_bn_add_relu_backward_reduce = register_op(
    "bn_bn_add_relu_backward_reduce(Tensor grad, Tensor mask, Tensor y, Tensor mean, Tensor invstd,"
    " Tensor skip, Tensor skip_mean, Tensor skip_invstd)"
    " -> (Tensor sum_dz, Tensor sum_dz_xhat, Tensor sum_dz_skip_xhat)",
    reference.bn_bn_add_relu_backward_reduce,
    _fake_sums,
)
bn_bn_add_relu_backward = register_op(
    "bn_bn_add_relu_backward(Tensor grad, Tensor mask, Tensor y, Tensor mean, Tensor invstd, Tensor? weight,"
    " Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor skip, Tensor skip_mean, Tensor skip_invstd, Tensor? skip_weight,"
    " Tensor? skip_sum_dz, Tensor? sum_dz_skip_xhat) -> (Tensor dy, Tensor dskip)",
    reference.bn_bn_add_relu_backward,
    fake_gradients,
)


class _BnBnAddRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        skip: Tensor,
        skip_weight: Tensor | None,
        skip_bias: Tensor | None,
        stats: BatchStats,
        skip_stats: BatchStats,
        mode: BnMode,
        skip_mode: BnMode,
    ) -> Tensor:
        out: Tensor
        out, mask = bn_bn_add_relu_forward(
            y, *stats[:2], weight, bias, skip, *skip_stats[:2], skip_weight, skip_bias
        )
        ctx.mode, ctx.skip_mode = mode, skip_mode
        save(ctx, [y, skip], [mask, weight, skip_weight, *stats[:3], *skip_stats[:3]])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y, skip), (mask, weight, skip_weight, *both) = saved(ctx)
        stats, skip_stats = BatchStats(*both[:3]), BatchStats(*both[3:])
        (mean, invstd, count_fraction, _), (skip_mean, skip_invstd, skip_count_fraction, _) = (
            stats,
            skip_stats,
        )
        needs_grad = ctx.needs_input_grad[:6]
        (training, group), (skip_training, skip_group) = ctx.mode, ctx.skip_mode
        if needs_plain_backward(grad):
            dz = torch.where(unpack_mask(mask, y), grad, 0.0)

            def again(y: Tensor, weight: Tensor | None, skip: Tensor, skip_weight: Tensor | None) -> Tensor:
                z = normalized(y, weight, None, stats, ctx.mode)
                return (z + normalized(skip, skip_weight, None, skip_stats, ctx.skip_mode)).to(y.dtype)

            inputs, needs = (y, weight, skip, skip_weight), [needs_grad[i] for i in (0, 1, 3, 4)]
            dy, dweight, dskip, dskip_weight = differentiable_backward(again, inputs, needs, dz)
            dbias, dskip_bias = (bias_gradient(dz) if needs_grad[i] else None for i in (2, 5))
            return dy, dweight, dbias, dskip, dskip_weight, dskip_bias, *[None] * 4
        dbias = dweight = dskip_weight = None
        sums: list[Tensor | None] = [None, None]
        skip_sums: list[Tensor | None] = [None, None]
        if training or skip_training or any(needs_grad[i] for i in (1, 2, 4, 5)):
            dbias, dweight, dskip_weight = bn_bn_add_relu_backward_reduce(
                grad, mask, y, mean, invstd, skip, skip_mean, skip_invstd
            )
            if training:
                sums = [*shared_sums((dbias, dweight), group, count_fraction)]
            if skip_training:
                skip_sums = [*shared_sums((dbias, dskip_weight), skip_group, skip_count_fraction)]
        dy, dskip = bn_bn_add_relu_backward(
            grad, mask, y, mean, invstd, weight, *sums, skip, skip_mean, skip_invstd, skip_weight, *skip_sums
        )
        # Cloned: two gradients must not share memory, since a user may scale one in place.
        dskip_bias = None if dbias is None else dbias.clone()
        all_grads = (dy, dweight, dbias, dskip, dskip_weight, dskip_bias)
        wanted = [g if needed else None for g, needed in zip(all_grads, needs_grad, strict=True)]
        return *wanted, *[None] * 4


def bn_bn_add_relu(y: Tensor, skip: Tensor, bn: BatchNorm, skip_bn: BatchNorm) -> Tensor:
    """relu(batch_norm(y) + batch_norm(skip)) of activations (N, C, H, W), in their dtype and y's layout."""
    stats, skip_stats = stats_for(y, bn), stats_for(skip, skip_bn)
    parameters = (in_statistics_dtype(p, y) for p in (bn.weight, bn.bias, skip_bn.weight, skip_bn.bias))
    weight, bias, skip_weight, skip_bias = parameters
    modes = BnMode.of(bn), BnMode.of(skip_bn)
    out: Tensor = _BnBnAddRelu.apply(y, weight, bias, skip, skip_weight, skip_bias, stats, skip_stats, *modes)
    return out
