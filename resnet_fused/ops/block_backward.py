"""The backward of a residual block: from its output through the branches, then back along the chain."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.layout import subsample
from resnet_fused.ops.block_forward import BlockSpec, Parameters, after_bn, kernel_weights
from resnet_fused.ops.bn_add_relu import bn_add_relu_backward_reduce
from resnet_fused.ops.bn_relu import bn_relu_backward_reduce
from resnet_fused.ops.bn_stats import shared_sums
from resnet_fused.ops.conv_bn import conv_backward, conv_bn_stats
from resnet_fused.ops.fold_algebra import fold_gradients, fold_gradients_across
from resnet_fused.ops.folded_conv_bn import folded_dgrad, folded_wgrad
from resnet_fused.ops.vendor_conv import materialize, materialize_gradient
from resnet_fused.types import Activation, BatchStats, DgradFactors, Gradient, InputCovariance, Pair


class Backward:
    """One backward pass of a block. Gradients w.r.t. parameters are collected in ``grads``, one tuple for each conv.

    Args:
        skip: the shortcut's input; None: ``x``.
        needs: whether the gradient w.r.t. the block's input is needed, and w.r.t. each weight.
    """

    def __init__(
        self,
        block: BlockSpec,
        needs: tuple[bool, list[bool]],
        x: Tensor,
        skip: Tensor | None,
        mask: Tensor,
        parameters: list[Parameters],
        ys: list[Tensor],
        stats: list[BatchStats],
        folds: list[InputCovariance],
        branch_ys: list[Tensor | None],
    ) -> None:
        self.block, self.specs = block, block.convs
        self.needs_input, self.needs_weight = needs
        self.x, self.skip, self.mask, self.parameters = x, skip, mask, parameters
        self.ys, self.stats, self.folds, self.branch_ys = ys, stats, folds, branch_ys
        self.weights = kernel_weights(parameters, x.dtype, block.triton)
        self.grads: list[tuple[Tensor | None, ...]] = [(None, None, None)] * len(parameters)

    def run(self, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients w.r.t. the block's input and ``skip``, from that w.r.t. its output."""
        grad = grad.contiguous(memory_format=torch.channels_last)
        (da, *sums), dskip = self.branches(grad)
        for i in reversed(range(1, self.block.chain)):
            dy = self.bn_relu_backward(i, da, sums)
            del da
            a = after_bn(self.ys[i - 1], self.stats[i - 1], self.parameters[i - 1], None, self.specs[i].lazy)
            da, *sums = self.conv_backward(i, dy, a)
            del dy, a
        dy = self.bn_relu_backward(0, da, sums)
        del da
        shortcut: tuple[Tensor | None, Tensor | None, Pair] = (grad, self.mask, (1, 1))
        if self.skip is not None:
            shortcut = (None, None, (1, 1))
        elif dskip is not None:
            shortcut = (dskip, None, self.specs[-1].input_stride)
        dx, *_ = self.conv_backward(0, dy, Activation(self.x), *shortcut, needs_input=self.needs_input)
        return dx if self.needs_input else None, None if self.skip is None else dskip

    # From the block's output to the chain

    def branches(self, grad: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The gradients w.r.t. the inputs of the branches, the main one's with its sums; None: there is no second."""
        first, count = self.block.chain, len(self.specs) - self.block.chain
        inputs = [self.branch_input(k) for k in range(count)]
        folded = [k for k in range(count) if self.specs[first + k].folded]
        operands: list[list[Tensor | None] | Pair] = []
        for k in folded:
            spec = self.specs[first + k]
            operands += [[*inputs[k]], spec.input_stride if spec.lazy else (1, 1)]
        operands += [[], (1, 1)] * (2 - len(folded))
        gradients: dict[int, tuple[Tensor, ...]] = {}
        factors: list[list[Tensor | None]] = []
        if folded:
            *qs, sum_dz = folded_wgrad(grad, self.mask, *operands)
        # By branch, so that all ranks issue their all-reduces in the same order, even if they fold different branches.
        for k in range(count):
            if k in folded:
                factors.append([*self.fold_gradients(k, sum_dz, qs[len(factors)])])
            else:
                gradients[k] = self.plain_branch(grad, k, inputs[k])
        if folded:
            factors += [[]] * (2 - len(folded))
            da, dskip, *sums = folded_dgrad(
                grad, self.mask, factors[0], *operands[:2], factors[1], *operands[2:]
            )
            gradients.update(zip(folded, [(da, *sums), (dskip,)], strict=False))
        return gradients[0], gradients[1][0] if count > 1 else None

    def branch_input(self, k: int) -> Activation:
        i = self.block.chain + k
        spec, shift = self.specs[i], self.folds[k].shift
        if k == 0:
            return after_bn(self.ys[-1], self.stats[i - 1], self.parameters[i - 1], shift, spec.lazy)
        source = self.x if self.skip is None else self.skip
        if spec.lazy and spec.folded:
            return Activation(source, shift=shift)
        a = Activation(subsample(source, spec.input_stride), shift=shift)
        return a if spec.lazy else Activation(materialize(a))

    def fold_gradients(self, k: int, sum_dz: Tensor, q: Tensor) -> DgradFactors:
        """The gradients w.r.t. a folded convolution's parameters are set."""
        i, fold, pixels = self.block.chain + k, self.folds[k], len(self.mask)
        spec, stats, weight = self.specs[i], self.stats[i], self.weights[i].to(self.x.dtype).flatten(1)
        gamma = self.parameters[i].gamma
        if spec.group is None:
            norm = gamma, stats.mean, stats.invstd, fold.mean, fold.covariance
            dweight, dgamma, scaled, matrix, vector = fold_gradients(weight, *norm, sum_dz, q, pixels)
        else:
            dweight, dgamma, scaled, matrix, vector = fold_gradients_across(
                weight, gamma, stats, fold, sum_dz, q, pixels, spec.group
            )
        self.set_weight_grad(i, dweight)
        # Both branches have the same sum, and no two gradients may share memory.
        self.set_bn_grads(i, dgamma, sum_dz if k == 0 else sum_dz.clone())
        scaled = scaled[:, :, None, None]
        if spec.running_stats is not None:
            return DgradFactors(scaled)
        return DgradFactors(scaled, matrix[:, :, None, None], vector)

    def plain_branch(self, grad: Tensor, k: int, a: Activation) -> tuple[Tensor, ...]:
        """As ``conv_backward``, through a branch that is not folded."""
        i = self.block.chain + k
        y, gamma, (mean, invstd, _, coeffs) = self.branch_ys[k], self.parameters[i].gamma, self.stats[i]
        if y is None:
            spec = self.specs[i]
            weight = self.weights[i].to(self.x.dtype)
            y, *_ = conv_bn_stats([*a], weight, *spec.geometry, spec.eps, False, None, None, False)
        sums = bn_add_relu_backward_reduce(grad, self.mask, y, mean, invstd)
        dy = Gradient(grad, self.mask, y, mean, invstd, gamma, self.parameters[i].beta)
        dy = dy._replace(bn_coeffs=coeffs)
        return self.conv_backward(i, self.gradient(i, dy, *sums), a)

    # Through the chain

    def bn_relu_backward(self, i: int, da: Tensor, sums: list[Tensor]) -> Gradient:
        """The gradient w.r.t. the i-th convolution's output, from that w.r.t. relu(bn(y)).

        sums: sum_dz, sum_dz_xhat and dy_coeffs of this process, if the op that computed da computed them too.
        """
        y, (mean, invstd, _, coeffs) = self.ys[i], self.stats[i]
        _, gamma, beta = self.parameters[i]
        dy = Gradient(da, None, y, mean, invstd, gamma, beta, bn_coeffs=coeffs)
        if not sums[0].numel():
            sums = [*bn_relu_backward_reduce(da, y, mean, invstd, gamma, beta), sums[2]]
        spec = self.specs[i]
        if self.block.triton and spec.running_stats is None and spec.group is None:
            dy = dy._replace(dy_coeffs=sums[2])
        return self.gradient(i, dy, *sums[:2])

    def gradient(self, i: int, dy: Gradient, sum_dz: Tensor, sum_dz_xhat: Tensor) -> Gradient:
        """``dy`` with its sums over all processes; those of this one are the gradients w.r.t. its batch norm."""
        self.set_bn_grads(i, sum_dz_xhat, sum_dz)
        spec = self.specs[i]
        if spec.running_stats is None:
            shared = shared_sums((sum_dz, sum_dz_xhat), spec.group, self.stats[i].count_fraction)
            dy = dy._replace(sum_dz=shared[0], sum_dz_xhat=shared[1])
        return dy if spec.lazy else Gradient(materialize_gradient(dy))

    def conv_backward(
        self,
        i: int,
        dy: Gradient,
        a: Activation,
        residual: Tensor | None = None,
        residual_mask: Tensor | None = None,
        input_stride: Pair = (1, 1),
        needs_input: bool = True,
    ) -> tuple[Tensor, ...]:
        """The gradient w.r.t. a convolution's input and its sums; that w.r.t. its weight is set."""
        needs = [needs_input, self.needs_weight[i]]
        shortcut = residual, residual_mask, input_stride
        *gradients, dweight = conv_backward(
            [*dy], [*a], self.weights[i].to(self.x.dtype), *self.specs[i].geometry, *shortcut, needs
        )
        if needs[1]:
            self.set_weight_grad(i, dweight)
        return tuple(gradients)

    def set_bn_grads(self, i: int, dgamma: Tensor, dbeta: Tensor) -> None:
        self.grads[i] = (self.grads[i][0], dgamma, dbeta)

    def set_weight_grad(self, i: int, dweight: Tensor) -> None:
        weight = self.parameters[i].weight
        grad = dweight.view_as(weight).to(weight.dtype)
        if weight.shape[2:] == (1, 1):
            # Eager's strides on channels_last input, also of dimensions of size 1: DDP compares them.
            inputs = weight.shape[1]
            grad = grad.contiguous().as_strided(weight.shape, (inputs, 1, inputs, inputs))
        self.grads[i] = (grad, *self.grads[i][1:])
