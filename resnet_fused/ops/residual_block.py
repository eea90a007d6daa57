"""A whole residual block as one op: bottleneck and basic_block.

A block is a chain of convolutions, each with a batch norm and a ReLU, a last convolution with a batch norm, and a
shortcut that is the input or a convolution of it with a batch norm of its own. For backward it keeps its input, the
outputs of the chain's convolutions (and of the last one where that is not folded), one bit per element of its output,
and small per-channel data; relu(bn(y)) is computed again where it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops._autograd import differentiable_backward, normalized
from resnet_fused.ops._branch import (
    ConvNorm,
    Fold,
    Measured,
    Stage,
    convolved_shape,
    folded_gradients,
    folds,
    measure,
    measure_folded,
)
from resnet_fused.ops.batch_norm_stats import (
    Statistics,
    batch_norm_stats,
    frozen_statistics,
    in_statistics_dtype,
    shared_sums,
    update_running,
)
from resnet_fused.ops.bn_add_relu import backward_dy, backward_reduce
from resnet_fused.ops.bn_relu import backward_pass as bn_relu_backward
from resnet_fused.ops.bn_relu import backward_reduce as bn_relu_backward_reduce
from resnet_fused.ops.bn_relu import forward_pass as bn_relu
from resnet_fused.ops.folded import add_product_, conv1x1_backward, folded_add_relu, folded_backward
from resnet_fused.ops.masked_grad import masked_grad
from resnet_fused.reference.batch_norm import scale
from resnet_fused.reference.folded import rectified_mean
from resnet_fused.reference.layout import dense, is_channels_last, statistics_dtype

MaybeTensor = Tensor | None


class Parameters(NamedTuple):
    """Of one convolution and its batch norm, as autograd knows them."""

    weight: Tensor
    gamma: MaybeTensor
    beta: MaybeTensor


class Plan(NamedTuple):
    """A block's stages; the last of ``stages`` ends the main path."""

    stages: tuple[Stage, ...]
    downsample: Stage | None


def _convolution(x: Tensor, weight: Tensor, stage: Stage) -> Tensor:
    return torch.ops.aten.convolution.default(
        x, weight.to(x.dtype), None, stage.stride, stage.padding, stage.dilation, False, [0, 0], stage.groups
    )


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stage: Stage, needs: Sequence[bool]
) -> tuple[MaybeTensor, MaybeTensor]:
    if _is_plain_1x1(weight, stage) and all(needs):
        dx, dweight = conv1x1_backward(dy, x, weight.to(x.dtype), None, None)
        return dx, dweight.view_as(weight)
    geometry = (stage.stride, stage.padding, stage.dilation, False, [0, 0], stage.groups)
    dx, dweight, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight.to(x.dtype), None, *geometry, [*needs, False]
    )
    return dx, dweight


def _is_plain_1x1(weight: Tensor, stage: Stage) -> bool:
    return weight.shape[2:] == (1, 1) and (stage.stride, stage.padding, stage.groups) == ((1, 1), (0, 0), 1)


def _seen(x: Tensor, stage: Stage) -> Tensor:
    """The pixels of the block's input that its shortcut looks at."""
    down, right = stage.every
    if stage.every == (1, 1):
        return x
    return x[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last)


class _Branch(NamedTuple):
    """One of the two sums behind which the last ReLU stands, as ``folded_add_relu`` takes it."""

    y: Tensor
    conv: MaybeTensor
    measured: Measured
    fold: Fold

    def arguments(self, p: Parameters) -> tuple[MaybeTensor, ...]:
        mean, invstd, _ = self.measured.used
        return self.y, self.conv, mean, invstd, p.gamma, p.beta


def _plain_branch(a: Tensor, p: Parameters, stage: Stage) -> _Branch:
    y = _convolution(a, p.weight, stage).contiguous(memory_format=torch.channels_last)
    return _Branch(y, None, measure(y, stage), Fold(None, None, None))


def _folded_branch(c: Tensor, shift: MaybeTensor, p: Parameters, stage: Stage) -> _Branch:
    conv = p.weight.to(c.dtype)
    return _Branch(c, conv, *measure_folded(c, conv.flatten(1), shift, stage))


def _activated(y: Tensor, used: Statistics, p: Parameters, shift: MaybeTensor = None) -> Tensor:
    out: Tensor = bn_relu(y, used.mean, used.invstd, p.gamma, p.beta, shift)
    return out


def _shift_behind(p: Parameters, stage: Stage) -> MaybeTensor:
    """What centres relu(bn(y)) for a folded convolution whose statistics are the batch's."""
    return rectified_mean(p.gamma, p.beta) if stage.frozen is None else None


def _centre_of(x: Tensor, stage: Stage) -> MaybeTensor:
    """What centres the input of a folded downsample: its mean, in the activations' dtype so that c is exact."""
    if stage.frozen is not None:
        return None
    mean, _, _ = batch_norm_stats(x, 0.0)
    return mean.to(x.dtype).to(mean.dtype)


def _centred(x: Tensor, shift: MaybeTensor) -> Tensor:
    return x if shift is None else x - shift.to(x.dtype).view(1, -1, 1, 1)


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *flat: MaybeTensor) -> tuple[Tensor, ...]:
        parameters = _grouped(flat)
        *chain, last = plan.stages
        ys: list[Tensor] = []
        used: list[Statistics] = []
        running: list[Tensor] = []
        a = x
        for stage, p in zip(chain, parameters, strict=False):
            y = dense(_convolution(a, p.weight, stage))
            measured = measure(y, stage)
            ys.append(y)
            used.append(measured.used)
            running += measured.running
            behind = _shift_behind(p, last) if len(ys) == len(chain) and last.folded else None
            a = _activated(y, measured.used, p, behind)
        p = parameters[len(chain)]
        main = _folded_branch(a, behind, p, last) if last.folded else _plain_branch(a, p, last)
        running += main.measured.running
        branches, arguments = [main], main.arguments(p)
        del a
        if plan.downsample is None:
            arguments += (x, *[None] * 5)
        else:
            p, stage = parameters[-1], plan.downsample
            seen = _seen(x, stage)
            if stage.folded:
                shift = _centre_of(seen, stage)
                skip = _folded_branch(_centred(seen, shift), shift, p, stage)
            else:
                skip = _plain_branch(seen, p, stage)
            running += skip.measured.running
            branches.append(skip)
            arguments += skip.arguments(p)
        out: Tensor
        out, mask = folded_add_relu(*arguments)
        ctx.plan = plan
        kept = [None if b.conv is not None else b.y for b in branches]
        used += [b.measured.used for b in branches]
        ctx.counts = len(flat), len(ys), len(used), len(branches)
        ctx.save_for_backward(
            x, mask, *flat, *ys, *[v for s in used for v in s], *[v for b in branches for v in b.fold], *kept
        )
        ctx.mark_non_differentiable(*running)
        ctx.set_materialize_grads(False)
        return out, *running

    @staticmethod
    def backward(ctx: Any, grad: MaybeTensor, *_: MaybeTensor) -> tuple[MaybeTensor, ...]:
        if grad is None:
            return (None,) * (2 + ctx.counts[0])
        saved = iter(ctx.saved_tensors)
        take = lambda count: [next(saved) for _ in range(count)]  # noqa: E731
        x, mask = take(2)
        flats, chain_length, uses, ends = ctx.counts
        flat, ys = take(flats), take(chain_length)
        used = [Statistics(*take(3)) for _ in range(uses)]
        folds = [Fold(*take(3)) for _ in range(ends)]
        kept = take(ends)
        with without_autocast(grad.device.type):
            if torch.is_grad_enabled():
                return _differentiable(ctx, x, flat, used, grad)
            return _Backward(ctx, x, mask, _grouped(flat), ys, used, folds, kept).run(grad)


class _Backward:
    """One backward pass of a block. Gradients of parameters are collected in the order of the parameters."""

    def __init__(
        self,
        ctx: Any,
        x: Tensor,
        mask: Tensor,
        parameters: list[Parameters],
        ys: list[Tensor],
        used: list[Statistics],
        folds: list[Fold],
        kept: list[MaybeTensor],
    ) -> None:
        self.plan: Plan = ctx.plan
        self.needs = ctx.needs_input_grad
        self.x, self.mask, self.parameters = x, mask, parameters
        self.ys, self.used, self.folds, self.kept = ys, used, folds, kept
        self.grads: list[tuple[MaybeTensor, ...]] = [(None, None, None)] * len(parameters)
        self.chain = len(ys)

    def run(self, grad: Tensor) -> tuple[MaybeTensor, ...]:
        grad = grad.contiguous(memory_format=torch.channels_last)
        da, dskip = self.end(grad)
        for i in reversed(range(1, self.chain)):
            dy = self.behind_relu(da, i)
            a = self.activation(i - 1)
            da = self.convolution(dy, a, i)
        dy = self.behind_relu(da, 0)
        del da
        dx = self.first(dy, grad, dskip)
        flat = [g for grads in self.grads for g in grads]
        return tuple(g if needed else None for g, needed in zip((dx, None, *flat), self.needs, strict=True))

    def activation(self, i: int, shift: MaybeTensor = None) -> Tensor:
        return _activated(self.ys[i], self.used[i], self.parameters[i], shift)

    def end(self, grad: Tensor) -> tuple[Tensor, MaybeTensor]:
        """Gradients of the inputs of the two branches; None for a shortcut that is the input itself."""
        plan, places = self.plan, [self.chain]
        stages = [plan.stages[-1]]
        if plan.downsample is not None:
            places.append(self.chain + 1)
            stages.append(plan.downsample)
        inputs = [self.branch_input(k, stage) for k, stage in enumerate(stages)]
        folded = [k for k, stage in enumerate(stages) if stage.folded]
        of_folds: dict[int, tuple[Tensor, Tensor]] = {}
        if folded:
            matrices = []
            for k in folded:
                weight, gamma, _ = self.parameters[places[k]]
                factor = scale(self.used[places[k]].invstd, gamma)
                matrices.append(
                    (weight * factor.view(-1, 1, 1, 1)).transpose(0, 1).to(grad.dtype).contiguous()
                )
            sum_dz, products, partial = folded_backward(
                grad, self.mask, [inputs[k] for k in folded], matrices
            )
            of_folds = dict(zip(folded, zip(products, partial, strict=True), strict=True))
        gradients = []
        # In the order of the branches, whichever are folded: processes that share sums may differ in that.
        for k, (place, stage) in enumerate(zip(places, stages, strict=True)):
            if k in of_folds:
                product, dc = of_folds[k]
                self.finish_fold(place, stage, self.folds[k], inputs[k], sum_dz, product, dc)
                gradients.append(dc)
            else:
                y = self.kept[k]
                assert y is not None
                dy = self.behind_end(grad, y, place, stage)
                gradients.append(self.convolution(dy, inputs[k], place, stage))
        return gradients[0], gradients[1] if len(gradients) > 1 else None

    def branch_input(self, k: int, stage: Stage) -> Tensor:
        if k == 0:
            last = self.chain - 1
            shift = _shift_behind(self.parameters[last], stage) if stage.folded else None
            return self.activation(last, shift)
        return _centred(_seen(self.x, stage), self.folds[k].shift)

    def finish_fold(
        self, place: int, stage: Stage, fold: Fold, c: Tensor, sum_dz: Tensor, product: Tensor, dc: Tensor
    ) -> None:
        weight, gamma, _ = self.parameters[place]
        wide = weight.to(c.dtype).flatten(1).to(sum_dz.dtype)
        pixels = c.numel() // c.shape[1]
        found = folded_gradients(wide, gamma, self.used[place], fold, stage, sum_dz, product, pixels)
        if found.matrix is not None:
            assert found.vector is not None
            add_product_(dc, c, found.matrix.to(c.dtype)[:, :, None, None], found.vector)
        self.grads[place] = (found.weight.view_as(weight).to(weight.dtype), found.gamma, found.beta)

    def behind_end(self, grad: Tensor, y: Tensor, place: int, stage: Stage) -> Tensor:
        """dy of a plain branch."""
        mean, invstd, share = self.used[place]
        dbeta, dgamma = backward_reduce(grad, self.mask, y, mean, invstd)
        sums = shared_sums((dbeta, dgamma), stage.group, share) if stage.frozen is None else (None, None)
        self.grads[place] = (None, dgamma, dbeta)
        dy: Tensor = backward_dy(grad, self.mask, y, mean, invstd, self.parameters[place].gamma, *sums)
        return dy

    def behind_relu(self, da: Tensor, i: int) -> Tensor:
        """dy of a convolution of the chain."""
        y, stage, (_, gamma, beta) = self.ys[i], self.plan.stages[i], self.parameters[i]
        mean, invstd, share = self.used[i]
        dbeta, dgamma = bn_relu_backward_reduce(da, y, mean, invstd, gamma, beta)
        sums = shared_sums((dbeta, dgamma), stage.group, share) if stage.frozen is None else (None, None)
        self.grads[i] = (None, dgamma, dbeta)
        dy: Tensor = bn_relu_backward(da, y, mean, invstd, gamma, beta, *sums)
        return dy

    def convolution(self, dy: Tensor, a: Tensor, place: int, stage: Stage | None = None) -> Tensor:
        """Gradient of a convolution's input; that of its weight is noted."""
        weight = self.parameters[place].weight
        stage = stage or self.plan.stages[place]
        da, dweight = _convolution_backward(dy, a, weight, stage, [True, self.needs[2 + 3 * place]])
        self.note_weight(place, dweight)
        assert da is not None
        return da

    def note_weight(self, place: int, dweight: MaybeTensor) -> None:
        if dweight is not None:
            self.grads[place] = (dweight.to(self.parameters[place].weight.dtype), *self.grads[place][1:])

    def first(self, dy: Tensor, grad: Tensor, dskip: MaybeTensor) -> MaybeTensor:
        """The gradient of the block's input: through the first convolution and through the shortcut."""
        weight, stage, x = self.parameters[0].weight, self.plan.stages[0], self.x
        wanted = self.needs[0]
        same_size = dskip is None or dskip.shape == x.shape
        if wanted and same_size and _is_plain_1x1(weight, stage):
            residual, mask = (grad, self.mask) if dskip is None else (dskip, None)
            dx, dweight = conv1x1_backward(dy, x, weight.to(x.dtype), residual, mask)
            self.note_weight(0, dweight.view_as(weight))
            return dx
        found, dweight = _convolution_backward(dy, x, weight, stage, [wanted, self.needs[2]])
        self.note_weight(0, dweight)
        if not wanted:
            return None
        assert found is not None
        dx = found.contiguous(memory_format=torch.channels_last)
        if dskip is None:
            masked_grad(grad, self.mask, dx, True, None)
        else:
            assert self.plan.downsample is not None
            down, right = self.plan.downsample.every
            dx[:, :, ::down, ::right] += dskip
        return dx


def _grouped(flat: Sequence[MaybeTensor]) -> list[Parameters]:
    return [Parameters(*flat[i : i + 3]) for i in range(0, len(flat), 3)]  # type: ignore[arg-type]


def _differentiable(
    ctx: Any, x: Tensor, flat: list[MaybeTensor], used: list[Statistics], grad: Tensor
) -> tuple[MaybeTensor, ...]:
    """Gradients that can be differentiated again, through plain PyTorch."""
    plan: Plan = ctx.plan
    stages = [*plan.stages, *([] if plan.downsample is None else [plan.downsample])]

    def normed(a: Tensor, p: Parameters, place: int) -> Tensor:
        stage, (mean, invstd, _) = stages[place], used[place]
        down, right = stage.every
        a = a[:, :, ::down, ::right]
        y = F.conv2d(a, p.weight.to(a.dtype), None, stage.stride, stage.padding, stage.dilation, stage.groups)
        return normalized(y, p.gamma, p.beta, mean, invstd, stage.frozen is None)

    def again(x: Tensor, *flat: MaybeTensor) -> Tensor:
        parameters = _grouped(flat)
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


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which products of float32 vectors stay in float32."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


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
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
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
    with without_autocast(device):
        stages = tuple(_stage(part, vectors, part is parts[-1] and folds(part, pixels)) for part in parts)
        skip = (
            None
            if downsample is None
            else _stage(downsample, vectors, folds(downsample, pixels), shortcut=True)
        )
        flat: list[MaybeTensor] = []
        for part in every:
            gamma, beta = (in_statistics_dtype(v, x) for v in (part.norm.weight, part.norm.bias))
            flat += [part.weight, gamma, beta]
        out: Tensor
        out, *running = _ResidualBlock.apply(x, Plan(stages, skip), *flat)
    moments = iter(running)
    for part in every:
        if part.norm.training:
            update_running(part.norm, next(moments), next(moments))
    return out
