"""A whole residual block as one op: bottleneck and basic_block.

A block is a chain of convolutions, each with a batch norm and a ReLU, a last convolution with a batch norm, and a
shortcut that is the input or a convolution of it with a batch norm of its own. For backward it keeps its input, the
outputs of the chain's convolutions (and of the last one where that is not folded), one bit per element of its output,
and small per-channel data; relu(bn(y)) is computed again where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops import _fused_block, _vendor_block
from resnet_fused.ops._autograd import (
    autocast_dtype,
    differentiable_backward,
    needs_plain_backward,
    normalized,
    remember,
    remembered,
    save,
    saved,
    without_autocast,
)
from resnet_fused.ops._block import MaybeTensor, Parameters, Plan, grouped
from resnet_fused.ops._branch import ConvNorm, Fold, Stage, convolved_shape, folds
from resnet_fused.ops._fused_block import FusedBackward
from resnet_fused.ops._vendor_block import VendorBackward
from resnet_fused.ops.batch_norm_stats import (
    Norm,
    Statistics,
    check_norm,
    frozen_statistics,
    in_statistics_dtype,
    update_running,
)
from resnet_fused.ops.passes import runs_triton
from resnet_fused.reference.layout import dense, is_channels_last, statistics_dtype


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan_and_norms: tuple[Plan, list[Norm] | None], *flat: MaybeTensor
    ) -> tuple[Tensor, ...]:
        """The output, and where no norms are given the moments that their running statistics are updated with."""
        plan, norms = plan_and_norms
        run = _fused_block.forward if plan.fused else _vendor_block.forward
        out, mask, ys, used, folds, kept, running = run(x, plan, grouped(flat))
        if norms is not None:
            # Here, since checkpointing stops a recomputed forward as soon as all is saved.
            update_running(norms, running)
            running = []
        ctx.plan = plan
        ctx.counts = len(flat), len(used), len(folds)
        rest = *(v for s in used for v in s), *(v for f in folds for v in f)
        biases = flat[2::3]
        remember(ctx, biases)
        ctx.biased = tuple(bias is not None for bias in biases)
        # Outputs whose batch norm's backward takes the bias; Triton kernels do so at the ends of a block too.
        outputs = [*ys, *(kept if plan.fused else [])]
        copies = [_copied(*each) for each in zip_longest(biases, used, outputs)]
        save(ctx, [x, *ys, *kept], [mask, *flat[0::3], *flat[1::3], *copies, *rest])
        ctx.mark_non_differentiable(*running)
        ctx.set_materialize_grads(False)
        return out, *running

    @staticmethod
    def backward(ctx: Any, grad: MaybeTensor, *_: MaybeTensor) -> tuple[MaybeTensor, ...]:
        if grad is None:
            return (None,) * (2 + ctx.counts[0])
        flats, uses, ends = ctx.counts
        activations, others = saved(ctx)
        x, ys, kept = activations[0], activations[1:-ends], activations[-ends:]
        mask, values = others[0], iter(others[1:])
        take = lambda count: [next(values) for _ in range(count)]  # noqa: E731
        parameters = [Parameters(*p) for p in zip(*(take(flats // 3) for _ in range(3)), strict=True)]
        used = [Statistics(*take(len(Statistics._fields))) for _ in range(uses)]
        for i, (p, stats) in enumerate(zip(parameters, used, strict=True)):
            if ctx.biased[i] and stats.terms is not None:
                parameters[i] = p._replace(beta=stats.terms[1])
        folds = [Fold(*take(3)) for _ in range(ends)]
        with without_autocast(grad.device.type):
            if needs_plain_backward(grad):
                return _differentiable(ctx, x, parameters, used, grad)
            backward = FusedBackward if ctx.plan.fused else VendorBackward
            started = backward(ctx.plan, ctx.needs_input_grad, x, mask, parameters, ys, used, folds, kept)
            return started.gradients(grad)


def _copied(bias: MaybeTensor, stats: Statistics, output: MaybeTensor) -> MaybeTensor:
    """A bias for backward, which eager does not save: it may change in place before. None where it is not needed."""
    if bias is None or output is None or stats.terms is not None:  # terms hold it
        return None
    return bias.clone()


def _differentiable(
    ctx: Any, x: Tensor, parameters: list[Parameters], used: list[Statistics], grad: Tensor
) -> tuple[MaybeTensor, ...]:
    """Gradients by plain PyTorch, that can be differentiated again."""
    plan: Plan = ctx.plan
    biases = remembered(ctx)
    flat = [v for p, bias in zip(parameters, biases, strict=True) for v in p._replace(beta=bias)]
    stages = [*plan.stages, *([] if plan.downsample is None else [plan.downsample])]

    def normed(a: Tensor, p: Parameters, place: int) -> Tensor:
        stage, (mean, invstd, *_) = stages[place], used[place]
        down, right = stage.every
        a = a[:, :, ::down, ::right]
        y = F.conv2d(a, p.weight.to(a.dtype), None, stage.stride, stage.padding, stage.dilation, stage.groups)
        return normalized(y, p.gamma, p.beta, mean, invstd, stage.frozen is None)

    def again(x: Tensor, *flat: MaybeTensor) -> Tensor:
        parameters = grouped(flat)
        a, last = x, len(plan.stages) - 1
        for place in range(last):
            a = F.relu(normed(a, parameters[place], place)).to(x.dtype)
        z = normed(a, parameters[last], last)
        skip = x if plan.downsample is None else normed(x, parameters[-1], last + 1)
        return F.relu(z + skip).to(x.dtype)

    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
    group = next((stage.group for stage in stages if stage.group is not None), None)
    dx, *grads = differentiable_backward(again, (x, *flat), needs, grad, group)
    return dx, None, *grads


def _stage(part: ConvNorm, dtype: torch.dtype, folded: bool = False, shortcut: bool = False) -> Stage:
    norm = part.norm
    frozen = None if norm.training else frozen_statistics(norm, dtype)
    geometry = ((1, 1), part.stride)
    if shortcut and part.weight.shape[2:] == (1, 1) and part.padding == (0, 0):
        geometry = (part.stride, (1, 1))
    return Stage(*geometry, part.padding, part.dilation, part.groups, norm.eps, norm.group, frozen, folded)


def residual_block(x: Tensor, parts: Sequence[ConvNorm], downsample: ConvNorm | None) -> Tensor:
    """relu(bn(conv(...relu(bn(conv(x)))...)) + shortcut), for ``x`` (N, C, H, W), dense in channels_last.

    Running statistics are updated in place where the batch's are used. Under autocast everything runs in its dtype.

    Args:
        parts: the convolutions of the main path with their batch norms; all but the last with a ReLU behind.
        downsample: that of the shortcut; None: the shortcut is ``x``.

    Raises:
        ValueError: ``x`` is contiguous, the convolutions do not fit each other, or a batch has one value per channel.
        RuntimeError: a batch norm has another number of channels than its convolution makes, or no running statistics
            in evaluation.
    """
    device = x.device.type
    dtype = autocast_dtype(device) or x.dtype
    if x.dtype == torch.float64:
        dtype = x.dtype  # autocast leaves it alone
    x = dense(x.to(dtype))
    if not is_channels_last(x):
        raise ValueError("a block as one op takes channels_last: use x.to(memory_format=torch.channels_last)")
    vectors = statistics_dtype(dtype)
    shape = convolved_shape(x.shape, parts)
    if shape is None or shape != convolved_shape(x.shape, [] if downsample is None else [downsample]):
        raise ValueError(f"the convolutions do not fit each other or an input of shape {tuple(x.shape)}")
    pixels = shape[0] * shape[2] * shape[3]
    every = [*parts, *([] if downsample is None else [downsample])]
    for part in every:
        check_norm(part.norm, len(part.weight))
    fused = runs_triton(x)
    with without_autocast(device):
        stages = tuple(
            _stage(part, vectors, part is parts[-1] and folds(part, pixels, fused)) for part in parts
        )
        skip = (
            None
            if downsample is None
            else _stage(downsample, vectors, folds(downsample, pixels, fused), shortcut=True)
        )
        flat: list[MaybeTensor] = []
        for part in every:
            norm = part.norm
            flat += [part.weight, in_statistics_dtype(norm.weight, x), in_statistics_dtype(norm.bias, x)]
        out: Tensor
        training = [part.norm for part in every if part.norm.training]
        # torch.compile takes no buffers that an autograd.Function changes.
        norms = None if torch.compiler.is_compiling() else training
        out, *running = _ResidualBlock.apply(x, (Plan(stages, skip, fused), norms), *flat)
    if norms is None:
        update_running(training, running)
    return out
