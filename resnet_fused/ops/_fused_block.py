"""A block by kernels that make relu(bn(y)) and dy on the way: neither is ever written.

Every convolution takes its statistics along, every gradient of an input the sums for the batch norm below it, the end
of a block its batch norms, the shortcut, the ReLU and its bits. See docs/launch-plan.md for what is launched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops._block import (
    Backward,
    Forwarded,
    MaybeTensor,
    Parameters,
    Plan,
)
from resnet_fused.ops._branch import NO_FOLD, Fold, Measured, Stage, moments, settled
from resnet_fused.ops.batch_norm_stats import Statistics, check_pixels, shared_sums
from resnet_fused.ops.bn_add_relu import backward_reduce
from resnet_fused.ops.fold import fold_gradients, fold_statistics, rectified_mean
from resnet_fused.ops.folded import folded_add_relu
from resnet_fused.ops.passes import conv_backward, conv_stats, expand, folded_dgrad, folded_wgrad, gram_of
from resnet_fused.reference.layout import statistics_dtype
from resnet_fused.reference.operands import Activation, Gradient, Pair, norm_terms

#: Pixels from which the centre of a folded shortcut's input is estimated.
SAMPLE = 4096


def _behind(y: Tensor, used: Statistics, p: Parameters, shift: MaybeTensor = None) -> Activation:
    return Activation(y, used.mean, used.invstd, p.gamma, p.beta, shift, used.terms)


def _in_dtype(parameters: list[Parameters], dtype: torch.dtype) -> list[Parameters]:
    """With the weights as kernels take them: under autocast they are cast once, not by every kernel."""
    return [p._replace(weight=p.weight.to(dtype, memory_format=torch.channels_last)) for p in parameters]


def _convolve(source: Activation, p: Parameters, stage: Stage) -> tuple[Tensor, Measured]:
    """y, channels_last, and its statistics. ``every`` of a shortcut is its stride again."""
    stride = tuple(a * b for a, b in zip(stage.every, stage.stride, strict=True))
    geometry = (stride, stage.padding, stage.dilation, stage.groups)
    measure = stage.frozen is None
    y, mean, var, invstd, terms = conv_stats(
        [*source], p.weight, *geometry, stage.eps, measure, p.gamma, p.beta
    )
    if stage.frozen is not None:
        return y, Measured(stage.frozen, ())
    check_pixels(y.shape, stage.group)
    measured = settled(mean, mean, var, invstd, y.numel() // y.shape[1], stage)
    if stage.group is not None:
        terms = norm_terms(*measured.used[:2], p.gamma, p.beta)
    return y, measured._replace(used=measured.used._replace(terms=terms))


def _fold(source: Activation, p: Parameters, stage: Stage) -> tuple[Measured, Fold]:
    """Statistics of what a folded convolution would make."""
    if stage.frozen is not None:
        return Measured(stage.frozen, ()), NO_FOLD
    x, (down, right) = source.x, stage.every
    pixels = len(x) * -(-x.shape[2] // down) * -(-x.shape[3] // right)
    check_pixels((pixels, len(p.weight), 1, 1), stage.group)
    mean_c, covariance = gram_of([*source], stage.every)
    weight = p.weight.flatten(1)
    mean, true_mean, var, invstd = fold_statistics(weight, mean_c, covariance, source.shift, stage.eps)
    measured = settled(mean, true_mean, var, invstd, pixels, stage)
    return measured, Fold(source.shift, mean_c, covariance)


def _shift_behind(source: Activation, stage: Stage) -> MaybeTensor:
    """What centres relu(bn(y)) for a folded convolution whose statistics are the batch's."""
    if stage.frozen is not None or source.mean is None:
        return None
    weight = torch.ones_like(source.mean) if source.weight is None else source.weight
    bias = torch.zeros_like(source.mean) if source.bias is None else source.bias
    shift: Tensor = rectified_mean(weight, bias)
    return shift


def _centre_of(x: Tensor, stage: Stage) -> MaybeTensor:
    """What nearly centres the input of a folded shortcut, in the activations' dtype: the mean of some pixels.

    Near is enough: what is left of the mean is corrected exactly.
    """
    if stage.frozen is not None:
        return None
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    return rows[:: -(-len(rows) // SAMPLE)].mean(0).to(statistics_dtype(x.dtype))


class _End(NamedTuple):
    """One of the two sums at the end of a block: a folded convolution's input, or an output, or the block's input."""

    source: Activation
    p: Parameters | None = None
    measured: Measured | None = None
    fold: Fold = NO_FOLD
    folded: bool = False
    every: Pair = (1, 1)

    @property
    def conv(self) -> MaybeTensor:
        return self.p.weight if self.folded and self.p is not None else None

    @property
    def norm(self) -> list[MaybeTensor]:
        if self.measured is None or self.p is None:
            return [None] * 4
        return [self.measured.used.mean, self.measured.used.invstd, self.p.gamma, self.p.beta]


def _end(source: Activation, p: Parameters, stage: Stage) -> _End:
    if stage.folded:
        return _End(source, p, *_fold(source, p, stage), True, stage.every)
    y, measured = _convolve(source, p, stage)
    return _End(Activation(y), p, measured)


def forward(x: Tensor, plan: Plan, parameters: list[Parameters]) -> Forwarded:
    """The block's output, its mask, and what backward needs."""
    *chain, last = plan.stages
    parameters = _in_dtype(parameters, x.dtype)
    ys: list[Tensor] = []
    passed: list[Measured] = []
    source = Activation(x)
    for stage, p in zip(chain, parameters, strict=False):
        y, measured = _convolve(source, p, stage)
        ys.append(y)
        passed.append(measured)
        source = _behind(y, measured.used, p)
    if last.folded:
        source = source._replace(shift=_shift_behind(source, last))
    ends = [_end(source, parameters[len(chain)], last)]
    if plan.downsample is not None:
        shift = _centre_of(x, plan.downsample) if plan.downsample.folded else None
        ends.append(_end(Activation(x, shift=shift), parameters[-1], plan.downsample))
    main, skip = ends[0], ends[1] if len(ends) > 1 else _End(Activation(x))
    out: Tensor
    if main.folded or skip.folded:
        other = skip.source
        out, mask = expand(
            [*main.source], main.conv, main.norm, other.x, other.shift, skip.conv, skip.norm, skip.every
        )
    else:
        out, mask = folded_add_relu(main.source.x, None, *main.norm, skip.source.x, None, *skip.norm)
    passed += [end.measured for end in ends if end.measured is not None]
    kept = [None if end.folded else end.source.x for end in ends]
    used = [measured.used for measured in passed]
    return Forwarded(out, mask, ys, used, [end.fold for end in ends], kept, moments(passed))


class FusedBackward(Backward):
    """Backward of ``forward``."""

    def run(self, grad: Tensor) -> MaybeTensor:
        grad = grad.contiguous(memory_format=torch.channels_last)
        self.weights = [p.weight for p in _in_dtype(self.parameters, self.x.dtype)]
        (da, *sums), dskip = self.ends(grad)
        residual, bits = (grad, self.mask) if dskip is None else (dskip, None)
        every = (1, 1) if self.plan.downsample is None else self.plan.downsample.every
        for i in reversed(range(1, self.chain)):
            da, *sums = self.through(self.dy(da, i, sums), i, self.plan.stages[i], self.source(i - 1))
        dy, stage, source = self.dy(da, 0, sums), self.plan.stages[0], Activation(self.x)
        del da
        needs_input = self.needs[0]
        dx, *_ = self.through(dy, 0, stage, source, residual, bits, every, needs_input)
        return dx if needs_input else None

    def source(self, i: int, shift: MaybeTensor = None) -> Activation:
        """The input of the convolution behind the i-th of the chain."""
        return _behind(self.ys[i], self.used[i], self.parameters[i], shift)

    def ends(self, grad: Tensor) -> tuple[tuple[Tensor, ...], MaybeTensor]:
        """Of the main path the gradient of its last input and its sums for the batch norm below; of the shortcut too.

        In the order of the ends, whichever are folded: processes that share sums may differ in that.
        """
        stages = self.plan.ends
        sources = [self.source(self.chain - 1, self.folds[0].shift)]
        if len(stages) > 1:
            sources.append(Activation(self.x, shift=self.folds[1].shift))
        folded = [k for k, stage in enumerate(stages) if stage.folded]
        operands: list[Any] = []
        products: dict[int, Tensor] = {}
        if folded:
            for k in folded:
                operands += [[*sources[k]], stages[k].every]
            operands += [[], (1, 1)] * (2 - len(folded))
            *found, sum_dz = folded_wgrad(grad, self.mask, *operands)
            products = dict(zip(folded, found, strict=False))
        factors: list[list[MaybeTensor]] = []
        gradients: dict[int, tuple[Tensor, ...]] = {}
        for k, stage in enumerate(stages):
            if k in products:
                factors.append(self.factors(k, stage, sum_dz, products[k]))
            else:
                gradients[k] = self.plain_end(grad, k, stage, sources[k])
        if folded:
            factors += [[]] * (2 - len(folded))
            da, dskip, *sums = folded_dgrad(
                grad, self.mask, factors[0], *operands[:2], factors[1], *operands[2:]
            )
            gradients[folded[0]] = (da, *sums)
            if len(folded) > 1:
                gradients[1] = (dskip,)
        return gradients[0], gradients[1][0] if 1 in gradients else None

    def factors(self, k: int, stage: Stage, sum_dz: Tensor, product: Tensor) -> list[MaybeTensor]:
        """What the gradient of a folded convolution's input is made with; those of its parameters are noted."""
        place, fold, dtype = self.place(k), self.folds[k], self.x.dtype
        gamma = self.parameters[place].gamma
        if stage.group is None:
            mean, invstd, *_ = self.used[place]
            norm = (gamma, mean, invstd, fold.mean, fold.covariance)
            dweight, dgamma, scaled, matrix, vector = fold_gradients(
                self.weights[place].flatten(1), *norm, sum_dz, product, len(self.mask)
            )
            self.note_weight(place, dweight)
            self.note_fold_norm(place, dgamma, sum_dz)
        else:
            found = self.fold_gradients(place, stage, fold, sum_dz, product)
            scaled, matrix, vector = self.scaled(place, dtype), found.matrix, found.vector
        scaled = scaled[:, :, None, None]
        return [scaled, None, None] if stage.frozen else [scaled, matrix.to(dtype)[:, :, None, None], vector]

    def plain_end(self, grad: Tensor, k: int, stage: Stage, source: Activation) -> tuple[Tensor, ...]:
        """As ``through``, of an end of the block that is not folded."""
        place = self.place(k)
        y, (_, gamma, beta) = self.kept[k], self.parameters[place]
        mean, invstd, share, terms = self.used[place]
        assert y is not None
        dbeta, dgamma = backward_reduce(grad, self.mask, y, mean, invstd)
        self.note_norm(place, dgamma, dbeta)
        shared: list[MaybeTensor] = [None, None]
        if stage.frozen is None:
            shared = [*shared_sums((dbeta, dgamma), stage.group, share)]
        dy = Gradient(grad, self.mask, y, mean, invstd, gamma, beta, shared[0], shared[1], terms)
        return self.through(dy, place, stage, source) if k == 0 else self.through_shortcut(dy, place, stage)

    def through_shortcut(self, dy: Gradient, place: int, stage: Stage) -> tuple[Tensor, ...]:
        """As through, at those pixels alone that a shortcut sees."""
        x = self.x
        if stage.every != (1, 1):
            down, right = stage.every
            x = x[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last)
        return self.through(dy, place, stage, Activation(x))

    def dy(self, da: Tensor, i: int, sums: list[Tensor]) -> Gradient:
        """The gradient of the i-th convolution's output; those of its batch norm are noted.

        sums: sum_dz, sum_dz_xhat and slopes, of this process alone.
        """
        stage, (mean, invstd, share, terms) = self.plan.stages[i], self.used[i]
        _, gamma, beta = self.parameters[i]
        sum_dz, sum_dz_xhat, slopes = sums
        self.note_norm(i, sum_dz_xhat, sum_dz)
        shared: list[MaybeTensor] = [None, None]
        if stage.frozen is None:
            shared = [*shared_sums((sum_dz, sum_dz_xhat), stage.group, share)]
        known = slopes if stage.frozen is None and stage.group is None else None
        return Gradient(da, None, self.ys[i], mean, invstd, gamma, beta, shared[0], shared[1], terms, known)

    def through(
        self,
        dy: Gradient,
        place: int,
        stage: Stage,
        source: Activation,
        residual: MaybeTensor = None,
        bits: MaybeTensor = None,
        every: Pair = (1, 1),
        needs_input: bool = True,
    ) -> tuple[Tensor, ...]:
        """The gradient of a convolution's input and its sums; that of its weight is noted."""
        geometry = (stage.stride, stage.padding, stage.dilation, stage.groups)
        needs = [needs_input, self.needs[2 + 3 * place]]
        *gradients, dconv = conv_backward(
            [*dy], [*source], self.weights[place], *geometry, residual, bits, every, needs
        )
        if needs[1]:
            self.note_weight(place, dconv)
        return tuple(gradients)
