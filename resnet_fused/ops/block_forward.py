"""The forward of a residual block: a chain of convolutions, then one or two branches whose sum goes through a ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.layout import statistics_dtype
from resnet_fused.ops.bn_add_relu import bn_add_relu_forward
from resnet_fused.ops.bn_bn_add_relu import bn_bn_add_relu_forward
from resnet_fused.ops.bn_stats import FinalizedStats, check_pixels, finalize_stats, unbiased_stats
from resnet_fused.ops.conv_bn import conv_bn_stats
from resnet_fused.ops.fold_algebra import fold_statistics, rectified_mean
from resnet_fused.ops.folded_conv_bn import conv1x1_bn_add_relu, input_covariance
from resnet_fused.ops.vendor_conv import materialize
from resnet_fused.types import Activation, BatchStats, ConvGeometry, InputCovariance, Pair, make_bn_coeffs

#: Rows and columns of each image from which the mean of a folded convolution's input is estimated.
SAMPLE = 4


class Parameters(NamedTuple):
    """The differentiable parameters of one convolution and its batch norm."""

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None


class ConvSpec(NamedTuple):
    """The non-differentiable fields of a ConvBN.

    input_stride: of a 1x1 convolution of the shortcut, instead of its stride: its input is subsampled first.
    running_stats: the statistics to normalize with; None: the batch's.
    recomputed: whether backward computes its output again, which is not saved.
    lazy: whether its kernels compute operands in their prologues.
    """

    geometry: ConvGeometry
    input_stride: Pair
    eps: float
    group: dist.ProcessGroup | None
    running_stats: BatchStats | None
    folded: bool
    recomputed: bool
    lazy: bool


class BlockSpec(NamedTuple):
    """The convolutions of a block: the chain, the main path's last one and, if there is one, the shortcut's.

    triton: whether Triton kernels run, which take batch norms as coefficients.
    """

    convs: tuple[ConvSpec, ...]
    chain: int  # convolutions before the branches
    triton: bool


class Forwarded(NamedTuple):
    """What forward computes; all but ``out`` and ``running`` is saved for backward.

    stats: of all batch norms, the shortcut's last. folds, branch_ys: for each branch what is needed where it is
    folded, and its convolution's output where it is neither folded nor recomputed. running: see
    bn_stats.unbiased_stats.
    """

    out: Tensor
    mask: Tensor
    ys: list[Tensor]
    stats: list[BatchStats]
    folds: list[InputCovariance]
    branch_ys: list[Tensor | None]
    running: list[Tensor]


def kernel_weights(parameters: Sequence[Parameters], dtype: torch.dtype, triton: bool) -> list[Tensor]:
    """The weights as Triton kernels read them, channels_last and cast once; else as they are, to be cast where used.

    A copy of all weights of a block in 16 bits would count in the peak of memory.
    """
    if not triton:
        return [p.weight for p in parameters]
    return [p.weight.to(dtype, memory_format=torch.channels_last) for p in parameters]


def after_bn(y: Tensor, stats: BatchStats, p: Parameters, shift: Tensor | None, lazy: bool) -> Activation:
    """relu(bn(y)) - shift."""
    a = Activation(y, stats.mean, stats.invstd, p.gamma, p.beta, shift, stats.bn_coeffs)
    return a if lazy else Activation(materialize(a))


class _Branch(NamedTuple):
    """One of the two sums before the last ReLU: a folded convolution's input, or a tensor in memory."""

    a: Activation
    p: Parameters | None = None
    finalized: FinalizedStats | None = None
    fold: InputCovariance = InputCovariance()
    weight: Tensor | None = None  # of a folded convolution
    input_stride: Pair = (1, 1)

    @property
    def bn(self) -> list[Tensor | None]:
        if self.finalized is None or self.p is None:
            return [None] * 4
        return [self.finalized.stats.mean, self.finalized.stats.invstd, self.p.gamma, self.p.beta]


def forward(x: Tensor, skip: Tensor | None, block: BlockSpec, parameters: list[Parameters]) -> Forwarded:
    """The block's output, its mask, and what backward needs.

    Args:
        x: (N, C, H, W), channels_last.
        skip: the shortcut's input, channels_last; None: ``x``.
        parameters: one for each of block.convs.
    """
    chain, triton = block.chain, block.triton
    weights = kernel_weights(parameters, x.dtype, triton)
    a, shift = Activation(x), None
    ys: list[Tensor] = []
    finalized: list[FinalizedStats] = []
    for i, (spec, p) in enumerate(zip(block.convs[:chain], parameters, strict=False)):
        y, stats_of_y = _conv_bn(a, (1, 1), weights[i].to(x.dtype), p, spec, triton)
        ys.append(y)
        finalized.append(stats_of_y)
        if i + 1 == chain and _is_centered(block.convs[chain]):
            shift = _mean_after_bn(y, stats_of_y.stats, p, spec)
        a = after_bn(y, stats_of_y.stats, p, shift, block.convs[i + 1].lazy)
    branches = [_branch(a, shift, weights[chain].to(x.dtype), parameters[chain], block.convs[chain], triton)]
    source = x if skip is None else skip
    if len(block.convs) > chain + 1:
        spec = block.convs[-1]
        shift = _sample_mean(Activation(source), spec.input_stride) if _is_centered(spec) else None
        a = Activation(source, shift=shift)
        branches.append(_branch(a, shift, weights[-1].to(x.dtype), parameters[-1], spec, triton))
    main, other = branches[0], branches[1] if len(branches) > 1 else _Branch(Activation(source))
    if main.weight is not None or other.weight is not None:
        shortcut = other.a.x, other.a.shift, other.weight, other.bn, other.input_stride
        out, mask = conv1x1_bn_add_relu([*main.a], main.weight, main.bn, *shortcut)
    elif other.finalized is None:
        out, mask = bn_add_relu_forward(main.a.x, *main.bn, source)
    else:
        out, mask = bn_bn_add_relu_forward(main.a.x, *main.bn, other.a.x, *other.bn)
    finalized += [branch.finalized for branch in branches if branch.finalized is not None]
    branch_ys = [
        None if spec.folded or spec.recomputed else branch.a.x
        for spec, branch in zip(block.convs[chain:], branches, strict=True)
    ]
    stats = [each.stats for each in finalized]
    folds = [branch.fold for branch in branches]
    return Forwarded(out, mask, ys, stats, folds, branch_ys, unbiased_stats(finalized))


def _conv_bn(
    a: Activation, input_stride: Pair, weight: Tensor, p: Parameters, spec: ConvSpec, triton: bool
) -> tuple[Tensor, FinalizedStats]:
    """y = conv(a), channels_last, and its statistics."""
    stride, padding, dilation, groups = spec.geometry
    stride = stride[0] * input_stride[0], stride[1] * input_stride[1]
    training = spec.running_stats is None
    y, mean, var, invstd, bn_coeffs = conv_bn_stats(
        [*a], weight, stride, padding, dilation, groups, spec.eps, training, p.gamma, p.beta, triton
    )
    if spec.running_stats is not None:
        return y, FinalizedStats(spec.running_stats)
    check_pixels(y.shape, spec.group)
    finalized = finalize_stats(mean, mean, var, invstd, y.numel() // y.shape[1], spec.eps, spec.group)
    if triton:
        if spec.group is not None:
            bn_coeffs = make_bn_coeffs(*finalized.stats[:2], p.gamma, p.beta)
        finalized = finalized._replace(stats=finalized.stats._replace(bn_coeffs=bn_coeffs))
    return y, finalized


def _branch(
    a: Activation, shift: Tensor | None, weight: Tensor, p: Parameters, spec: ConvSpec, triton: bool
) -> _Branch:
    """A branch with input ``a``, from which ``shift`` is subtracted already or lazily."""
    input_stride = spec.input_stride
    if not spec.lazy:
        a, input_stride = Activation(materialize(a, input_stride)), (1, 1)
    if not spec.folded:
        y, finalized = _conv_bn(a, input_stride, weight, p, spec, triton)
        return _Branch(Activation(y), p, finalized)
    if spec.running_stats is not None:
        running = FinalizedStats(spec.running_stats)
        return _Branch(a, p, running, weight=weight, input_stride=input_stride)
    n, _, height, width = a.x.shape
    pixels = n * -(-height // input_stride[0]) * -(-width // input_stride[1])
    check_pixels((pixels, len(weight), 1, 1), spec.group)
    mean, covariance = input_covariance([*a], input_stride)
    mean_y, true_mean, var, invstd = fold_statistics(weight.flatten(1), mean, covariance, shift, spec.eps)
    finalized = finalize_stats(mean_y, true_mean, var, invstd, pixels, spec.eps, spec.group)
    return _Branch(a, p, finalized, InputCovariance(shift, mean, covariance), weight, input_stride)


def _is_centered(spec: ConvSpec) -> bool:
    """Whether a convolution is folded with statistics of the batch, which are accurate for centered input."""
    return spec.folded and spec.running_stats is None


def _mean_after_bn(y: Tensor, stats: BatchStats, p: Parameters, spec: ConvSpec) -> Tensor:
    """An approximate mean of relu(bn(y)), used as shift; with statistics of the batch it takes no pass over y."""
    if spec.running_stats is not None:
        return _sample_mean(after_bn(y, stats, p, None, lazy=True), (1, 1))
    gamma = torch.ones_like(stats.mean) if p.gamma is None else p.gamma
    beta = torch.zeros_like(stats.mean) if p.beta is None else p.beta
    mean: Tensor = rectified_mean(gamma, beta)
    return mean


def _sample_mean(a: Activation, input_stride: Pair) -> Tensor:
    """An approximate mean of the input of a folded convolution, used as shift: that of some pixels.

    An approximation is enough: the remaining mean is corrected exactly. But they are pixels that the convolution sees:
    others may be infinite.
    """
    subsampled = a.x[:, :, :: input_stride[0], :: input_stride[1]]
    rows, cols = (-(-size // SAMPLE) for size in subsampled.shape[2:])
    pixels = subsampled[:, :, ::rows, ::cols]
    if a.mean is not None:
        pixels = materialize(a._replace(x=pixels.contiguous(memory_format=torch.channels_last)))
    return pixels.mean((0, 2, 3)).to(statistics_dtype(a.x.dtype))
