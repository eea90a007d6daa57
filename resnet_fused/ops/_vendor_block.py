"""A block by vendor products with passes of our own between them.

relu(bn(y)) and dy are written for the library to read; where a convolution is folded they are shared by the passes that
need them, and a product and what is made of it stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops._block import Backward, Forwarded, MaybeTensor, Parameters, Plan
from resnet_fused.ops._branch import NO_FOLD, Fold, Measured, Stage, measure, measure_folded, moments
from resnet_fused.ops.batch_norm_stats import Statistics, batch_norm_stats, shared_sums
from resnet_fused.ops.bn_add_relu import backward_dy, backward_reduce
from resnet_fused.ops.bn_relu import backward_pass as bn_relu_backward
from resnet_fused.ops.bn_relu import backward_reduce as bn_relu_backward_reduce
from resnet_fused.ops.bn_relu import forward_pass as bn_relu
from resnet_fused.ops.folded import add_product_, conv1x1_backward, folded_add_relu, folded_backward
from resnet_fused.ops.masked_grad import masked_grad
from resnet_fused.reference.folded import rectified_mean
from resnet_fused.reference.layout import dense


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
        mean, invstd, *_ = self.measured.used
        return self.y, self.conv, mean, invstd, p.gamma, p.beta


def _plain_branch(a: Tensor, p: Parameters, stage: Stage) -> _Branch:
    y = _convolution(a, p.weight, stage).contiguous(memory_format=torch.channels_last)
    return _Branch(y, None, measure(y, stage), NO_FOLD)


def _folded_branch(c: Tensor, shift: MaybeTensor, p: Parameters, stage: Stage) -> _Branch:
    conv = p.weight.to(c.dtype)
    return _Branch(c, conv, *measure_folded(c, conv.flatten(1), shift, stage))


def _activated(y: Tensor, used: Statistics, p: Parameters, shift: MaybeTensor = None) -> Tensor:
    out: Tensor = bn_relu(y, used.mean, used.invstd, p.gamma, p.beta, shift)
    return out


def _centre_of(x: Tensor, stage: Stage) -> MaybeTensor:
    """What centres the input of a folded downsample: its mean, in the activations' dtype so that c is exact."""
    if stage.frozen is not None:
        return None
    mean, _, _ = batch_norm_stats(x, 0.0)
    return mean.to(x.dtype).to(mean.dtype)


def _centred(x: Tensor, shift: MaybeTensor) -> Tensor:
    return x if shift is None else x - shift.to(x.dtype).view(1, -1, 1, 1)


def _shift_behind(p: Parameters, stage: Stage) -> MaybeTensor:
    """What centres relu(bn(y)) for a folded convolution whose statistics are the batch's."""
    return rectified_mean(p.gamma, p.beta) if stage.frozen is None else None


def forward(x: Tensor, plan: Plan, parameters: list[Parameters]) -> Forwarded:
    """The block's output, its mask, and what backward needs."""
    *chain, last = plan.stages
    ys: list[Tensor] = []
    used: list[Statistics] = []
    passed: list[Measured] = []
    a = x
    for stage, p in zip(chain, parameters, strict=False):
        y = dense(_convolution(a, p.weight, stage))
        measured = measure(y, stage)
        ys.append(y)
        used.append(measured.used)
        passed.append(measured)
        behind = _shift_behind(p, last) if len(ys) == len(chain) and last.folded else None
        a = _activated(y, measured.used, p, behind)
    p = parameters[len(chain)]
    main = _folded_branch(a, behind, p, last) if last.folded else _plain_branch(a, p, last)
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
        branches.append(skip)
        arguments += skip.arguments(p)
    out: Tensor
    out, mask = folded_add_relu(*arguments)
    kept = [None if b.conv is not None else b.y for b in branches]
    used += [b.measured.used for b in branches]
    running = moments([*passed, *(b.measured for b in branches)])
    return Forwarded(out, mask, ys, used, [b.fold for b in branches], kept, running)


class VendorBackward(Backward):
    """Backward of ``forward``."""

    def run(self, grad: Tensor) -> MaybeTensor:
        grad = grad.contiguous(memory_format=torch.channels_last)
        da, dskip = self.end(grad)
        for i in reversed(range(1, self.chain)):
            dy = self.behind_relu(da, i)
            a = self.activation(i - 1)
            da = self.convolution(dy, a, i)
        dy = self.behind_relu(da, 0)
        del da
        return self.first(dy, grad, dskip)

    def activation(self, i: int, shift: MaybeTensor = None) -> Tensor:
        return _activated(self.ys[i], self.used[i], self.parameters[i], shift)

    def end(self, grad: Tensor) -> tuple[Tensor, MaybeTensor]:
        """Gradients of the inputs of the two branches; None for a shortcut that is the input itself."""
        stages = self.plan.ends
        inputs = [self.branch_input(k, stage) for k, stage in enumerate(stages)]
        folded = [k for k, stage in enumerate(stages) if stage.folded]
        of_folds: dict[int, tuple[Tensor, Tensor]] = {}
        if folded:
            matrices = [
                self.scaled(self.place(k), grad.dtype).t().contiguous()[:, :, None, None] for k in folded
            ]
            sum_dz, products, partial = folded_backward(
                grad, self.mask, [inputs[k] for k in folded], matrices
            )
            of_folds = dict(zip(folded, zip(products, partial, strict=True), strict=True))
        gradients = []
        # In the order of the branches, whichever are folded: processes that share sums may differ in that.
        for k, stage in enumerate(stages):
            place = self.place(k)
            if k in of_folds:
                product, dc = of_folds[k]
                found = self.fold_gradients(place, stage, self.folds[k], sum_dz, product)
                if found.matrix is not None:
                    add_product_(dc, inputs[k], found.matrix.to(dc.dtype)[:, :, None, None], found.vector)
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
            return self.activation(last, self.folds[0].shift)
        return _centred(_seen(self.x, stage), self.folds[k].shift)

    def behind_end(self, grad: Tensor, y: Tensor, place: int, stage: Stage) -> Tensor:
        """dy of a plain branch."""
        mean, invstd, share, _ = self.used[place]
        dbeta, dgamma = backward_reduce(grad, self.mask, y, mean, invstd)
        sums = shared_sums((dbeta, dgamma), stage.group, share) if stage.frozen is None else (None, None)
        self.note_norm(place, dgamma, dbeta)
        dy: Tensor = backward_dy(grad, self.mask, y, mean, invstd, self.parameters[place].gamma, *sums)
        return dy

    def behind_relu(self, da: Tensor, i: int) -> Tensor:
        """dy of a convolution of the chain."""
        y, stage, (_, gamma, beta) = self.ys[i], self.plan.stages[i], self.parameters[i]
        mean, invstd, share, _ = self.used[i]
        dbeta, dgamma = bn_relu_backward_reduce(da, y, mean, invstd, gamma, beta)
        sums = shared_sums((dbeta, dgamma), stage.group, share) if stage.frozen is None else (None, None)
        self.note_norm(i, dgamma, dbeta)
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

    def first(self, dy: Tensor, grad: Tensor, dskip: MaybeTensor) -> MaybeTensor:
        """The gradient of the block's input: through the first convolution and through the shortcut."""
        weight, stage, x = self.parameters[0].weight, self.plan.stages[0], self.x
        wanted = self.needs[0]
        same_size = dskip is None or dskip.shape == x.shape
        if wanted and same_size and _is_plain_1x1(weight, stage):
            residual, mask = (grad, self.mask) if dskip is None else (dskip, None)
            dx, dweight = conv1x1_backward(dy, x, weight.to(x.dtype), residual, mask)
            self.note_weight(0, dweight)
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
